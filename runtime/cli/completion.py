"""Shell completion for ``tg-run``: a script of a few lines, made from the options themselves.

Options are completed by name, their values where only some are allowed, everything else as files.
"""

from __future__ import annotations

import argparse
import shlex

from .options import make_parser

__all__ = ["script"]

# zsh runs bash's completions once bashcompinit is loaded.
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
_BASH = """\
_tg_run() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
    COMPREPLY=()
    case $previous in
{values}
    esac
    case $current in
        -*) COMPREPLY=($(compgen -W {options} -- "$current")) ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY+=($(compgen -W doctor -- "$current"))
    fi
}}
complete -o default -F _tg_run tg-run
"""


def script(shell: str) -> str:
    """The script for ``shell``, ``bash`` or ``zsh``, to be evaluated by it."""
    actions = make_parser()._actions
    options = [name for action in actions for name in action.option_strings]
    values = [
        f"        {'|'.join(action.option_strings)}) COMPREPLY=($(compgen -W "
        f'{shlex.quote(" ".join(map(str, action.choices)))} -- "$current")); return ;;'
        for action in actions
        if action.choices and not isinstance(action, argparse._SubParsersAction)
    ]
    bash = _BASH.format(values="\n".join(values), options=shlex.quote(" ".join(options)))
    return _ZSH + bash if shell == "zsh" else bash
