"""What the documentation site needs beside Markdown: equations as MathML, and links from docstrings' roles.

An extension of Python-Markdown, named in ``mkdocs.yml``; it sees pages and docstrings alike.
"""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor

# What pymdownx.arithmatex leaves of $…$ and $$…$$.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
# A role such as :class:`clip_m2df.M2DF`; Markdown takes its second half for code.
ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>([\w.]+)</code>")


class SiteExtension(Extension):
    """Rewrites the HTML of a page, or of a docstring in it."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Run after everything else."""
        md.postprocessors.register(SitePostprocessor(md), "site", -100)


class SitePostprocessor(Postprocessor):
    """Turns equations into MathML, and roles into links."""

    def run(self, text: str) -> str:
        """Rewrite HTML."""
        return ROLE.sub(_link, EQUATION.sub(_mathml, text))


def makeExtension(**_: Any) -> SiteExtension:  # noqa: N802
    """Give Python-Markdown what it asks a module for."""
    return SiteExtension()


def _mathml(equation: re.Match[str]) -> str:
    display = "block" if equation[1] == "div" else "inline"
    return convert(unescape(equation[2]).strip(), display=display)


def _link(role: re.Match[str]) -> str:
    """The name alone, which leads to its entry if the site has one."""
    path = role[1]
    return f'<autoref identifier="{path}" optional><code>{path.rpartition(".")[2]}</code></autoref>'
