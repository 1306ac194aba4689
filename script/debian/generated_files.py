"""Files of the Debian package that are written from others: its configuration, and the licences of what it bundles.

``generated_files.py configuration SOURCE TARGET``, ``generated_files.py copyright SITE-PACKAGES HEAD TARGET``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

_CREDENTIALS = "/run/credentials/pdmworkqueue.service"
#: Section and key → value where the daemon runs as a service.
_CONFIGURATION = {
    ("tls", "certificate"): f"{_CREDENTIALS}/hostcert.pem",
    ("tls", "key"): f"{_CREDENTIALS}/hostkey.pem",
    ("tls", "trust"): "/etc/grid-security/certificates",
    ("state", "folder"): "/var/lib/pdm",
    ("credentials", "folder"): "/run/pdm/credentials",
}
_HEADER = """\
# Configuration of the PDM workqueue daemon, as a service: keys without a "#" differ from the defaults of the program.
# [tls]: systemd copies /etc/grid-security/hostcert.pem and hostkey.pem to where only the daemon can read them
# (LoadCredential= in the unit; systemctl edit pdmworkqueue changes it). See workqueue.conf(5), pdmworkqueue(8).
"""
_LICENCE_FILES = ("LICEN", "COPYING", "NOTICE")


def configuration(text: str) -> str:
    """The commented configuration of the package, with the keys of `_CONFIGURATION` set.

    Raises:
        KeyError: a key is not in it.
    """
    missing, section, lines = dict(_CONFIGURATION), "", []
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        key = line.removeprefix("#").partition(" =")[0]
        value = missing.pop((section, key), None) if line.startswith("#") else None
        lines.append(line if value is None else f"{key} = {value}")
    if missing:
        raise KeyError(str(sorted(missing)))
    return _HEADER + "\n".join(lines).partition("\n")[2] + "\n"


def copyright_of(site: str) -> Iterator[str]:
    """A paragraph of Debian's copyright file for each library in a directory."""
    for each in sorted(distributions(path=[site]), key=lambda each: each.name.lower()):
        if each.name != "pdm-workqueue":
            yield _paragraph(each, Path(site))


def _paragraph(library: Distribution, site: Path) -> str:
    metadata = library.metadata
    # Names are normalised in the names of directories.
    name = re.sub(r"[-_.]+", "_", library.name).lower()
    directory = next(path for path in site.glob("*.dist-info") if path.name.partition("-")[0].lower() == name)
    files = [path for path in directory.rglob("*") if path.is_file() and path.name.upper().startswith(_LICENCE_FILES)]
    named = metadata.get("License-Expression") or metadata.get("License") or "as its classifiers say"
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License")]
    author = metadata.get("Author") or metadata.get("Author-email") or f"the authors of {library.name}"
    texts = [_short(path.read_text(encoding="utf-8", errors="replace")) for path in sorted(files)]
    lines = [named.splitlines()[0], *classifiers, *"\n\n".join(texts).splitlines()]
    return (
        f"\nFiles: usr/lib/pdm-workqueue/lib/*/site-packages/{directory.name.partition('-')[0]}*\n"
        f"Comment: {library.name} {library.version}\n"
        f"Copyright: {author.splitlines()[0]}\n"
        f"License: {library.name.lower()}-{library.version}\n"
    ) + "".join(f" {line.rstrip()}\n" if line.strip() else " .\n" for line in lines)


def _short(licence: str) -> str:
    """A licence; one that each Debian system has is named by its file."""
    if "Apache License" in licence and "TERMS AND CONDITIONS" in licence:
        return "On Debian systems its text is in /usr/share/common-licenses/Apache-2.0."
    return licence


def main(kind: str, source: str, *targets: str) -> None:
    """Write one of the files."""
    if kind == "configuration":
        text = configuration(Path(source).read_text(encoding="utf-8"))
    else:
        text = Path(targets[0]).read_text(encoding="utf-8") + "".join(copyright_of(source))
    Path(targets[-1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
