"""`polymodal --completion bash|zsh|fish`: what a shell offers at Tab, written out of the parsers once.

polymodal --completion bash >> ~/.bashrc
polymodal --completion zsh >> ~/.zshrc
polymodal --completion fish > ~/.config/fish/completions/polymodal.fish
"""

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_polymodal() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} offers=
  if [ "$COMP_CWORD" -eq 1 ]; then
    offers="{verbs}"
  else
    case "$verb $prev" in
{choices}
      *) case "$verb" in
{flags}
      esac ;;
    esac
  fi
  case "$cur" in
    -*) COMPREPLY=($(compgen -W "$offers" -- "$cur")) ;;
    *) COMPREPLY=($(compgen -W "$(printf '%s\\n' $offers | grep -v '^-')" -- "$cur")) ;;
  esac
}}
complete -o default -F _polymodal polymodal
"""

_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell; files are completed where nothing else is."""
    verbs = _verbs(parser)
    if shell == "fish":
        return "\n".join(_fish(parser, verbs)) + "\n"
    flags, choices = [], []
    for name, verb in verbs.items():
        words = [*_verbs(verb), *(flag for action in _options(verb) for flag in action.option_strings)]
        flags.append(f'        {name}) offers="{" ".join(dict.fromkeys(words))}" ;;')
        for action in _options(verb):
            if action.choices is not None:
                patterns = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                choices.append(f'      {patterns}) offers="{" ".join(map(str, action.choices))}" ;;')
    own = [flag for action in _options(parser) for flag in action.option_strings]
    bash = _BASH.format(verbs=" ".join([*verbs, *own]), choices="\n".join(choices), flags="\n".join(flags))
    return _ZSH + bash if shell == "zsh" else bash


def _verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's verbs or actions, by name."""
    return next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})  # type: ignore[return-value]


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags of a verb and of its actions."""
    inner = [action for verb in _verbs(parser).values() for action in verb._actions]
    return [action for action in [*parser._actions, *inner] if action.option_strings]


def _fish(parser: argparse.ArgumentParser, verbs: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    helps = {a.dest: a.help or "" for group in parser._actions for a in getattr(group, "_choices_actions", ())}
    for name in verbs:
        yield f"complete -c polymodal -n __fish_use_subcommand -f -a {name} -d {_quoted(helps.get(name, ''))}"
    for name, verb in (("", parser), *verbs.items()):
        when = f"'__fish_seen_subcommand_from {name}'" if name else "__fish_use_subcommand"
        if inner := " ".join(_verbs(verb)) if name else "":
            yield f"complete -c polymodal -n {when} -f -a {_quoted(inner)}"
        for action in _options(verb) if name else [a for a in parser._actions if a.option_strings]:
            names = (f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings)
            takes = "" if action.nargs == 0 else " -r"
            if action.choices is not None:
                takes = f" -x -a {_quoted(' '.join(map(str, action.choices)))}"
            about = " ".join((action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%").split())
            yield f"complete -c polymodal -n {when} {' '.join(names)}{takes} -d {_quoted(about)}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
