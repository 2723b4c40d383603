"""URLs that may hold a secret: what of them may be shown or written down."""

from __future__ import annotations

import re

# A file name may be joined to a URL by pathlib, which keeps one of its two slashes.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?P<rest>[^\s\"'<>]+)")


def without_credentials(text: str) -> str:
    """``text`` with every URL in it cut down to ``scheme://host/path``.

    User and password go, and so do query and fragment, where object stores put their signatures. All up to the last
    ``@`` counts as user and password, since a secret key may hold a slash.
    """
    return _URL.sub(lambda url: url["scheme"] + re.split(r"[?#]", url["rest"])[0].rpartition("@")[2], text)
