"""Pages of the site that are made from other files (a hook of mkdocs): README, changelog, commands, options, library.

Links of pages to files outside of ``docs/`` work in a checkout; on the site they lead to the repository where
``repo_url`` is set (mkdocs.yml, or a fork's own), and are plain text where it is not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import hbp
from hbp import config as options
from hbp.cli.main import make_parser

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^]\[]*(?:`[^`]*`)?[^]\[]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")
MARK = re.compile(r"^<!-- .* -->\n", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    pages = {
        "index.md": _from_root("README.md"),
        "changelog.md": _from_root("CHANGELOG.md"),
        "contributing.md": _from_root("CONTRIBUTING.md"),
        "commands.md": _commands(),
        "options.md": f"# Options of a run\n\nWhat `hbp train --help` prints.\n\n```text\n{options.describe()}\n```\n",
        "reference.md": _reference(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Take links from where the page stands in the checkout to where it stands on the site."""

    def moved(found: re.Match[str]) -> str:
        text, target = found.groups()
        if files.get_file_from_path(target.partition("#")[0]) is not None:
            return found[0]
        outside = target.removeprefix("../")
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{outside})" if config.repo_url else text

    return LINK.sub(moved, markdown)


def _from_root(name: str) -> str:
    """A page of the top folder, as if it stood in ``docs/``."""
    text = MARK.sub("", (ROOT / name).read_text()).replace("(docs/", "(")
    for other in ("CONTRIBUTING", "CHANGELOG"):
        text = text.replace(f"({other}.md)", f"({other.lower()}.md)")
    return text


def _commands() -> str:
    parser, commands = make_parser()
    parts = ["# Commands", f"```text\n{parser.format_help()}```"]
    for name, command in commands.items():
        text = command.format_help().partition("\noptions of CONFIG.yaml:")[0].rstrip()
        parts.append(f"## hbp {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _reference() -> str:
    names = "\n\n".join(f"::: {hbp._HOMES[name]}.{name}" for name in sorted(hbp.__all__))
    more = (
        "hbp.integrations.export.export_plan",
        "hbp.integrations.rows.as_rows",
        "hbp.planning.strategy.Strategy",
        "hbp.run_log.StepRecord",
    )
    return (
        "# Reference\n\n[The library](library.md) has an example of each; `HBPTrainer` and `HBPSFTTrainer` are "
        f"in [trainers](trainers.md).\n\n## `import hbp`\n\n{names}\n\n## Further modules\n\n"
        + "\n\n".join(f"::: {name}" for name in more)
        + "\n"
    )
