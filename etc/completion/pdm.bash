# Completion of pdm in bash: to /usr/share/bash-completion/completions/pdm, or "source" it.
_pdm() {
    local IFS=$'\n' replies
    # The daemon's sites and paths come from a cache, or within three seconds from the service.
    mapfile -t replies < <("$1" complete bash -- "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null)
    if [ "${replies[0]-}" = files ]; then
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$2")
        return
    fi
    compopt -o nospace
    COMPREPLY=()
    [ -z "${replies[*]}" ] || COMPREPLY=("${replies[@]}")
}
complete -F _pdm pdm pdm-workqueue
