# Completion of pdm in fish: to /usr/share/fish/vendor_completions.d, or ~/.config/fish/completions.
function __pdm_complete
    set -l words (commandline -opc) (commandline -ct)
    # The token as fish would pass it, without its quotes and backslashes.
    set words[-1] (string unescape -- $words[-1]; or echo -- $words[-1])
    for line in ($words[1] complete fish -- $words[2..-1] 2>/dev/null)
        set -l fields (string split \t -- $line)
        if test "$fields[1]" = files
            __fish_complete_path (commandline -ct)
        else
            printf '%s\t%s\n' $fields[2] "$fields[3]"
        end
    end
end
complete -c pdm -f -a '(__pdm_complete)'
complete -c pdm-workqueue -f -a '(__pdm_complete)'
