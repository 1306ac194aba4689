"""``python -m pdm.workqueue.cli``: the same as ``pdm``."""

from pdm.workqueue.cli.main import main

main()
