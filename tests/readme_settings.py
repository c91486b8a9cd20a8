"""The README's table of settings, written anew from the schema: `make readme`."""

import re
from pathlib import Path

from dist_train.config_help import describe_settings, may_change

README = Path(__file__).parents[1] / "README.md"


def settings_table() -> str:
    """Return the README's table of settings in Markdown."""
    rows = [
        f"| `{key}`{' ↻' if may_change(key) else ''} | `{default}` | {meaning} |"
        for key, default, meaning in describe_settings()
    ]
    head = ["Those marked ↻ may change when a run is continued; another value of the others makes it another run.", ""]
    return "\n".join([*head, "| setting | default | meaning |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    shown = re.compile(r"(<!-- settings -->\n).*(\n<!-- /settings -->)", re.DOTALL)
    README.write_text(shown.sub(lambda match: match[1] + settings_table() + match[2], text), encoding="utf-8")
