"""docs/security.md names every installed package whose terms ask something of who passes it on."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from importlib.metadata import Distribution, distributions

from tests.paths import ROOT

_DEMANDING = re.compile(
    r"\b(A?GPL|LGPL|GNU|MPL|Mozilla|EPL|Eclipse|EUPL|CDDL|CC-BY|SSPL|BUSL|proprietary|licenseref)", re.IGNORECASE
)
_PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|ISC|PSF|Python Software|HPND|CNRI|Unlicense|Zope|ZPL|Zlib|Unicode|OFL|BSL|Boost|"
    r"0BSD|CC0|public domain|"
    r"Permission is hereby granted|Redistribution and use)",
    re.IGNORECASE,
)


def _terms(package: Distribution) -> str:
    """What a package says of its licence: its expression, else classifiers and name, else the head of the file."""
    about = package.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    classifiers = [line for line in about.get_all("Classifier") or [] if line.startswith("License")]
    stated = " ".join([*classifiers, *(about.get("License") or "").splitlines()[:1]])
    if _PERMISSIVE.search(stated) or _DEMANDING.search(stated):
        return stated
    files = [file for file in package.files or [] if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))]
    return stated + " ".join(file.read_text(encoding="utf-8")[:600] for file in files)


def _free(terms: str) -> bool:
    return bool(_PERMISSIVE.search(terms)) and not _DEMANDING.search(terms)


def test_every_package_whose_terms_ask_something_of_who_ships_it_is_named() -> None:
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w.*-]+)`", text[text.index("## Licences") :])
    missing = []
    for package in distributions():
        name = re.sub(r"[-_.]+", "-", str(package.metadata["Name"])).lower()
        terms = _terms(package)
        if not all(any(_free(choice) for choice in part.split(" OR ")) for part in terms.split(" AND ")):
            missing += [] if any(fnmatch(name, pattern) for pattern in named) else [f"{name}: {terms[:80]}"]
    assert missing == []
