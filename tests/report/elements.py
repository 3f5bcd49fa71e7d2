"""A page as elements: what tests ask about its structure."""

from html.parser import HTMLParser
from xml.etree.ElementTree import Element, SubElement

_VOID = {"meta", "link", "img", "br"}


class _Builder(HTMLParser):
    """Strict, as a browser is not: each element is closed where it should be."""

    def __init__(self):
        super().__init__()
        self.root = Element("page")
        self._open = [self.root]

    def handle_starttag(self, tag, attrs):
        made = SubElement(self._open[-1], tag, {name: value or "" for name, value in attrs})
        if tag not in _VOID:
            self._open.append(made)

    def handle_endtag(self, tag):
        assert self._open[-1].tag == tag, f"</{tag}> at {self.getpos()} closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data):
        last = self._open[-1]
        if len(last):
            last[-1].tail = (last[-1].tail or "") + data
        else:
            last.text = (last.text or "") + data

    def done(self):
        assert self._open == [self.root], f"<{self._open[-1].tag}> is never closed"
        return self.root


def parsed(html):
    """The root above <html>."""
    builder = _Builder()
    builder.feed(html)
    builder.close()
    return builder.done()


def text(element):
    """What a reader sees of it, with single spaces."""
    return " ".join("".join(element.itertext()).split())


def table(page, caption):
    """The rows of a table as elements, header first."""
    found = next(each for each in page.iter("table") if text(each.find("caption")) == caption)
    return [list(row) for row in found.iter("tr")]


def cells(page, caption):
    """The rows of a table as texts."""
    return [[text(cell) for cell in row] for row in table(page, caption)]


def place(page, name):
    """The element that #name leads to; there is one."""
    (found,) = (each for each in page.iter() if each.get("id") == name.removeprefix("#"))
    return found


def ids(element):
    """The question ids that a list holds."""
    return [text(item) for item in element.iter("li")]
