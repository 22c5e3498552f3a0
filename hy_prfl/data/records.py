"""Reads rows of JSON, JSON Lines, CSV and text files, for manifests, annotations and prompts."""

import csv
import io
import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

# Field of a row -> its possible names in a file.
Fields = Mapping[str, Sequence[str]]
# A row as a mapping, and its place in the file, for messages.
Record = tuple[str, dict[str, Any]]

DELIMITERS = (",", ";", "\t", "|")
# Texts that pandas and spreadsheets write for missing values.
MISSING = {"nan", "none", "null", "n/a", "#n/a", "<na>"}
# Missing values in tables of R and pandas, in exactly this spelling. JSON files have null instead.
MISSING_IN_TABLES = {"NA", "#NA", "NaT", "-nan", "-NaN", "#N/A N/A"}
WORKBOOKS = {b"PK\x03\x04": "an Excel workbook (or another zip file)", b"\xd0\xcf\x11\xe0": "an old Excel workbook"}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Below this number, floats represent every whole number exactly.
EXACT = 2**53
DECIMAL = r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?"


def read_records(path: Path, fields: Fields, *, lines_of: str | None = None) -> list[Record]:
    """
    Rows of a JSON list, JSON Lines or CSV file as dictionaries, each with its place in the file.

    Names of columns are stripped and lowercased, and blanks and hyphens in them become `_`. The separator of a CSV file
    may be `,`, `;`, tab or `|`; the one that gives the most known columns is used. CSV lines without any value are
    ignored. A NaN, and a text such as `nan` or `null` (in CSV also `NA`), count as missing: they become None, and their
    number is logged.

    Args:
        fields (`Mapping[str, Sequence[str]]`):
            Known fields, and the names that each may have.
        lines_of (`str`, *optional*):
            Field for the lines of a `.txt` file. Without it, such files are refused.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be parsed, a row is not a mapping, no column is known, or two columns of a row
            mean the same field. The message names file and row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'.")
    suffix = path.suffix.lower()
    if suffix == ".txt" and lines_of is not None:
        lines = read_utf8(path).split("\n")
        records = [
            (f"{path}, line {number}", {lines_of: line}) for number, line in enumerate(lines, 1) if line.strip()
        ]
    elif suffix in (".csv", ".tsv"):
        records = _read_csv(path, read_utf8(path), fields)
    elif suffix == ".jsonl":
        lines = read_utf8(path).split("\n")
        numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        records = [(where, _mapping(parse_json(line, where, is_line=True), where)) for where, line in numbered]
    elif suffix == ".json":
        values = parse_json(read_utf8(path), str(path))
        if not isinstance(values, list):
            keys = f" with {', '.join(f'`{key}`' for key in values)}" if isinstance(values, dict) and values else ""
            kind = "an empty dict" if values == {} else f"a {type(values).__name__}"
            raise ValueError(f"{path}: expected a JSON list of rows, got {kind}{keys}.")
        places = [(f"{path}, row {number}", value) for number, value in enumerate(values, 1)]
        records = [(where, _mapping(value, where)) for where, value in places]
    else:
        text = ", .txt" if lines_of is not None else ""
        raise ValueError(f"{path}: expected a .json, .jsonl{text} or .csv file.")
    records = _without_placeholders(path, records, MISSING_IN_TABLES if suffix in (".csv", ".tsv") else ())
    _check_names(path, records, fields)
    return records


def read_utf8(path: Path) -> str:
    """
    Text of a file, with `\\n` as line endings.

    Raises:
        ValueError: If it is a workbook or not UTF-8. The message names the line and its content.
    """
    data = path.read_bytes()
    for start, kind in WORKBOOKS.items():
        if data.startswith(start):
            raise ValueError(f"{path}: this is {kind}, not text; save it as CSV (UTF-8).")
    if data.startswith(UTF_16) or b"\0" in data[:4096]:
        raise ValueError(f"{path}: not UTF-8 text but UTF-16 or binary data; save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error's positions count from the end of a byte order mark, if there is one.
        data = error.object
        number = data.count(b"\n", 0, error.start) + 1
        begin = data.rfind(b"\n", 0, error.start) + 1
        shown = data[max(begin, error.start - 30) : error.start + 30].split(b"\n")[0].decode("latin-1")
        raise ValueError(
            f"{path}: not UTF-8 text: line {number} has the byte 0x{data[error.start]:02x}, read as Latin-1 {shown!r}; "
            "save the file as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, where: str, *, is_line: bool = False) -> Any:
    """
    Parse JSON. Raises a `ValueError` that names `where` if it is not valid, or if an object has a key twice.

    Args:
        is_line (`bool`, defaults to `False`):
            Whether the text is a line of a JSON Lines file.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except json.JSONDecodeError as error:
        if is_line:
            hint = " A line holds one object and nothing else."
        else:
            hint = " Is it JSON Lines? Then its name must end in .jsonl." if error.msg == "Extra data" else ""
        raise ValueError(f"{where}: not valid JSON: {error}.{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON: nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"`{next(name for name in names if names.count(name) > 1)}` appears twice in one object.")
    return values


def _mapping(value: Any, where: str) -> dict[str, Any]:
    """A row of JSON with `plain_name` applied to its fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a mapping of field names to values, got {value!r}.")
    names = [plain_name(name) for name in value]
    _check_repeated(names, where)
    return dict(zip(names, value.values(), strict=True))


def plain_name(name: str) -> str:
    """Normalized name of a column: ` Long-Caption ` becomes `long_caption`."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _check_repeated(names: Sequence[str], where: str) -> None:
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: the column `{repeated[0]}` appears twice.")


def _read_csv(path: Path, text: str, fields: Fields) -> list[Record]:
    rows = _csv_rows(path, text, _delimiter(text, fields))
    header_line, header = next(rows, (1, []))
    names = [plain_name(name) for name in header]
    _check_repeated(names, f"{path}, line {header_line}")
    for known in fields.values():
        found = [name for name in names if name in known]
        if len(found) > 1:
            raise ValueError(f"{path}, line {header_line}: {_ticked(found, ' and ')} mean the same; keep one.")
    records = []
    for line, values in rows:
        where = f"{path}, line {line}"
        if len(values) != len(names):
            raise ValueError(
                f"{where}: expected {len(names)} values, as the header has, got {len(values)}: {values!r}. A value with "
                "the separator in it must be in double quotes."
            )
        nameless = [value for name, value in zip(names, values, strict=True) if not name and value.strip()]
        if nameless:
            raise ValueError(f"{where}: the column with {nameless[0]!r} has no name in the header.")
        records.append((where, {name: value for name, value in zip(names, values, strict=True) if name}))
    if not records and names:
        _check_known(path, names, fields)
    return records


def _delimiter(text: str, fields: Fields) -> str:
    """The separator that gives the header the most known columns, or the most columns if none is known."""
    # Excel may name the separator in a line of its own.
    named = re.match(r"sep=([,;\t|])\n", text, re.IGNORECASE)
    if named is not None:
        return named.group(1)
    known = {name for names in fields.values() for name in names}
    counts = {}
    for delimiter in DELIMITERS:
        lines = io.StringIO(text.lstrip("\n"), newline="")
        try:
            header = next(csv.reader(lines, delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:
            # Not readable with this separator. If none works, reading the rows raises the error.
            header = []
        counts[delimiter] = (len({plain_name(name) for name in header} & known), len(header))
    return max(DELIMITERS, key=lambda delimiter: counts[delimiter])


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, each with the number of its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    try:
        for values in reader:
            if any(value.strip() for value in values) and not (line == 1 and values[0].lower().startswith("sep=")):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not valid CSV: {error}.") from error


def _check_names(path: Path, records: Sequence[Record], fields: Fields) -> None:
    """Refuse a file without any known column, and a row with two columns that mean the same field."""
    for where, record in records:
        for names in fields.values():
            found = [name for name in names if name in record and not is_missing(record[name])]
            if len(found) > 1:
                differ = " but differ" if len({str(record[name]).strip() for name in found}) > 1 else ""
                raise ValueError(f"{where}: {_ticked(found, ' and ')} mean the same{differ}; keep one.")
    if records:
        _check_known(path, columns_of(records), fields)


def _check_known(path: Path, found: Sequence[str], fields: Fields) -> None:
    if not any(name in names for names in fields.values() for name in found):
        raise ValueError(f"{path}: none of its columns is known. {describe_columns(found, fields)}")


def columns_of(records: Sequence[Record]) -> list[str]:
    """Names of all columns, in order of appearance."""
    return list(dict.fromkeys(name for _, record in records for name in record))


def describe_columns(found: Sequence[str], fields: Fields) -> str:
    """Text for errors: the columns of a file, and the columns that it may have."""
    wanted = [f"{names[0]} ({', '.join(names[1:])})" if len(names) > 1 else names[0] for names in fields.values()]
    return f"Columns found: {', '.join(found) or 'none'}. Columns wanted: {', '.join(wanted)}."


def _ticked(names: Sequence[str], separator: str) -> str:
    return separator.join(f"`{name}`" for name in names)


def is_missing(value: Any) -> bool:
    """Whether a value is missing: None, NaN, blanks, or a text such as `nan`, `None`, `null` or `N/A`."""
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def _without_placeholders(path: Path, records: Sequence[Record], words: Collection[str]) -> list[Record]:
    """Replace missing values by None, and log the texts that were taken for missing values."""
    placeholders: dict[tuple[str, str], int] = {}
    for _, record in records:
        for name, value in record.items():
            if is_missing(value) or (isinstance(value, str) and value.strip() in words):
                if isinstance(value, str) and value.strip():
                    key = (name, value.strip())
                    placeholders[key] = placeholders.get(key, 0) + 1
                record[name] = None
    for (name, text), count in placeholders.items():
        logger.warning(f"{path}: `{name}` is {text!r} in {count} row(s), which counts as missing.")
    return list(records)


def read_text(record: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """
    Text of the first of `names` that has a value; None if none has one.

    Raises:
        ValueError: If a value is neither text nor a whole number, has a character that cannot be written (half of a
            surrogate pair, NUL), or if two names have different values.
    """
    found: dict[str, str] = {}
    for name in names:
        value = record.get(name)
        if is_missing(value):
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"{where}: `{name}` must be text, got {value!r}.")
        found[name] = str(value).strip()
        unwritable = re.search("[\0\ud800-\udfff]", found[name])
        if unwritable is not None:
            what = "a NUL" if unwritable[0] == "\0" else "half of a surrogate pair"
            raise ValueError(f"{where}: `{name}` contains {what}, {ascii(unwritable[0])}: {ascii(found[name])}.")
    if len(set(found.values())) > 1:
        raise ValueError(f"{where}: {_ticked(list(found), ' and ')} mean the same but differ.")
    return next(iter(found.values()), None)


def read_whole_number(record: Mapping[str, Any], name: str, where: str) -> int | None:
    """
    A whole number from 0 to 10^18 - 1; None if there is none. `1`, `"1"`, `1.0` and `"1.0"` are the same.

    Raises:
        ValueError: If the value is something else.
    """
    value = record.get(name)
    if is_missing(value):
        return None
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip()):
        number = int(value)
    elif isinstance(value, float) or (isinstance(value, str) and re.fullmatch(DECIMAL, value.strip())):
        # From `EXACT` on, several whole numbers are the same float.
        number = int(float(value)) if float(value).is_integer() and abs(float(value)) < EXACT else None
    if number is None or not 0 <= number < 10**18:
        raise ValueError(f"{where}: `{name}` must be a whole number from 0 to 10^18 - 1, got {value!r}.")
    return number
