"""Which licences let a distribution into the corpus."""

from email.message import Message

import pytest
from sources import is_permissive_expression, licence_of


def metadata(*fields: tuple[str, str]) -> Message:
    message = Message()
    for name, value in fields:
        message[name] = value
    return message


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only or MIT", True),
        ("MPL-2.0 AND MIT", False),
        ("MIT OR GPL-3.0-only AND BSD-3-Clause", True),
        ("GPL-3.0-only OR MIT AND MPL-2.0", False),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("(MIT AND BSD-3-Clause)", True),
        # Nested choices are not worked out: everything they name has to be permissive.
        ("(Apache-2.0 OR MIT) AND Zlib", True),
        ("(MIT OR GPL-3.0-only) AND GPL-3.0-only", False),
        ("LicenseRef-Ours", False),
        ("", False),
    ],
)
def test_expression(expression: str, permissive: bool) -> None:
    assert is_permissive_expression(expression) is permissive


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # The expression decides where there is one.
        ([("License-Expression", "MIT"), ("License", "GPL")], ("MIT", True)),
        ([("Classifier", "License :: OSI Approved :: MIT License"), ("License", "GPL")], ("MIT License", True)),
        ([("Classifier", "License :: OSI Approved :: The Unlicense (Unlicense)")], ("The Unlicense (Unlicense)", True)),
        (
            [
                ("Classifier", "License :: OSI Approved :: BSD License"),
                ("Classifier", "License :: OSI Approved :: GNU General Public License (GPL)"),
            ],
            ("BSD License; GNU General Public License (GPL)", False),
        ),
        ([("Classifier", "License :: OSI Approved"), ("License", "3-clause BSD\nmore")], ("3-clause BSD", True)),
        ([("Classifier", "Topic :: MIT"), ("License", "Our own, compatible with MIT")],
         ("Our own, compatible with MIT", False)),
        ([("License", "BSD or GPL")], ("BSD or GPL", False)),
        ([("License", "Mitigated")], ("Mitigated", False)),
        ([], ("unknown", False)),
    ],
)  # fmt: skip
def test_licence_of_metadata(fields: list[tuple[str, str]], expected: tuple[str, bool]) -> None:
    assert licence_of(metadata(*fields)) == expected
