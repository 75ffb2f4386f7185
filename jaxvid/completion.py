"""Completion scripts for shells: the command `jaxvid completion`."""

from jaxvid import parsers
from jaxvid.command import COMMANDS
from jaxvid.config_files import config_names

BASH = r"""_jaxvid() {
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "@COMMANDS@ --help --version" -- "$word"))
    elif [ "$previous" = --config ]; then
        COMPREPLY=($(compgen -W "@CONFIGS@" -- "$word") $(compgen -f -- "$word"))
    elif [ "$previous" = completion ]; then
        COMPREPLY=($(compgen -W "bash zsh fish" -- "$word"))
    elif [ "${word#-}" != "$word" ]; then
        local options=$("${COMP_WORDS[0]}" "${COMP_WORDS[1]}" --help 2>/dev/null |
            grep -oE -- "--[a-z_]+" | sort -u)
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -o filenames -F _jaxvid jaxvid"""
ZSH = "autoload -Uz bashcompinit && bashcompinit\n" + BASH
FISH = r'''complete -c jaxvid -n __fish_is_first_arg -f -a "@COMMANDS@"
complete -c jaxvid -n "__fish_seen_subcommand_from completion" -f -a "bash zsh fish"
complete -c jaxvid -l config -x -a "@CONFIGS@"'''
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(shell: str) -> str:
    """Return the completion script for a shell, one of `parsers.SHELLS`."""
    text = SCRIPTS[shell].replace("@COMMANDS@", " ".join(COMMANDS))
    return text.replace("@CONFIGS@", " ".join(config_names()))


def main() -> int:
    """Run the command line."""
    print(script(parsers.completion().parse_args().shell))
    return 0
