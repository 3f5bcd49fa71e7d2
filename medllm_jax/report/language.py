"""Marks what is Japanese on an English page, so that browsers choose its fonts and readers aloud its voice."""

import re

from markupsafe import Markup, escape

# Kana, Chinese characters, their marks and full-width forms.
_JAPANESE = re.compile("[\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f]")
# From one Japanese character to the last that has nothing but marks and digits between.
_RUN = re.compile(f"{_JAPANESE.pattern}(?:[\u3000-\u303f\uff00-\uffef0-9・]*{_JAPANESE.pattern})*")


def lang(text: str) -> Markup:
    """The attribute of an element with this text: lang="ja" or nothing."""
    return Markup(' lang="ja"') if _JAPANESE.search(text) else Markup("")


def marked(text: str) -> Markup:
    """A text whose Japanese words stand in elements of their own."""
    parts, end = [], 0
    for found in _RUN.finditer(text):
        parts += [escape(text[end : found.start()]), Markup('<span lang="ja">{}</span>').format(found[0])]
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])
