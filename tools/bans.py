"""Bans that no linter knows: words and calls that must not stand in this repository.

python -m tools.bans
"""

import re
import subprocess
import sys
from pathlib import Path

BANS = {
    r"\b(?:pickle|cloudpickle|marshal|shelve|dill)\b(?=\s*[.(]|\s*$)": "no pickle anywhere",
    r"^\s*(?:import|from)\s+(?:pickle|cloudpickle|marshal|shelve|dill)\b": "no pickle anywhere",
    r"\btorch\.load\(": "torch.load unpickles; use safetensors or gguf",
    r"\byaml\.(?:unsafe_)?load\(": "configuration is TOML",
    r"(?<![\w.])(?:eval|exec)\(": "nothing is evaluated",
    r"\bshell=True": "commands are lists",
    r"# type: ignore(?!\[)": "name the error code that is ignored",
    r"except Exception:\s*pass": "an error is never swallowed",
}
LINES_MAX = 600


def tracked() -> list[Path]:
    """Python files that git tracks or would track, generated stubs left out."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return [Path(n) for n in names if "_pb2" not in n and n != "tools/bans.py" and Path(n).exists()]


def offences(path: Path) -> list[str]:
    """What one file must not hold, as ``file:line: reason``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        f"{path}:{number}: {reason}"
        for number, line in enumerate(lines, 1)
        for pattern, reason in BANS.items()
        if re.search(pattern, line)
    ]
    if len(lines) > LINES_MAX:
        found.append(f"{path}:{len(lines)}: over {LINES_MAX} lines; split it by nouns")
    return found


def main() -> None:
    """Entry point; exits with 1 where something banned stands."""
    found = [offence for path in tracked() for offence in offences(path)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
