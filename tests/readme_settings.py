"""Write the README's table of settings anew from the schema: `make readme`."""

import re
from pathlib import Path

from dist_train.config import settings_table

README = Path(__file__).parents[1] / "README.md"

if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    table = re.compile(r"(<!-- settings -->\n).*(\n<!-- /settings -->)", re.DOTALL)
    README.write_text(table.sub(lambda match: match[1] + settings_table() + match[2], text), encoding="utf-8")
