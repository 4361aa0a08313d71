"""What the documentation site needs beside Markdown: equations as MathML, and links from docstrings' roles.

mkdocs calls ``on_page_content`` with each page (``hooks`` in ``mkdocs.yml``).
"""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of $…$ and $$…$$.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
# A role such as :class:`clip_m2df.M2DF`; Markdown takes its second half for code.
ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Rewrite a page's HTML."""
    return ROLE.sub(_link, EQUATION.sub(_mathml, html))


def _mathml(equation: re.Match[str]) -> str:
    display = "block" if equation[1] == "div" else "inline"
    return convert(unescape(equation[2]).strip(), display=display)


def _link(role: re.Match[str]) -> str:
    """The name alone, which leads to its entry if the site has one."""
    path = role[1]
    return f'<autoref identifier="{path}" optional><code>{path.rpartition(".")[2]}</code></autoref>'
