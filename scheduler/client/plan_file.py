"""Plans as people write them: a TOML file with a table a plan, or `key=value` words for one plan.

Amounts are in minutes, in the plan's currency and as factors; the API has milliseconds, millionths and basis
points. What is read back is the same plan: writing and reading lose nothing. What cannot be understood is
said once, all of it, with the nearest key there is.

    [basic]
    minutes = 200
    running = 3

What a file leaves out, a key or a whole plan, stays as it is.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from operator import attrgetter
from pathlib import Path

from billing.v1.admin_pb2 import Plan
from scheduler.client.errors import Details, PlanNotUnderstood, Violation
from scheduler.client.names import last_part, plan_name

Value = bool | str | Decimal

_ETAG = "etag"
_CLASSES = "gpu_classes"
_ONE_BP = 10_000
_LARGEST_INT = 2**31 - 1
_LARGEST = 2**53
# Times of other granularity than a second have no finite decimal number of minutes. They are written with
# digits enough that the nearest whole millisecond is the right one.
_DIGITS = Decimal("1e-9")
_NEAR = Decimal("1e-3")

_HEADING = """\
# Plans, as `darkroom admin plans show --toml` prints them and `darkroom admin plans apply FILE` takes them.
# A key or a plan that is left out stays as it is. With its etag a plan is replaced only if nobody else has
# changed it since; take the etag out to replace it whatever it is now.
"""


@dataclass(frozen=True, kw_only=True)
class _Key:
    """A key of the file, and the field of the API's plan behind it."""

    name: str
    field: str
    kind: type[bool] | type[str] | type[Decimal]
    meaning: str
    unit: int = 1
    """Of the field, in one of the key."""
    most: int = _LARGEST_INT
    """Of the field: what its type can hold, or far beyond any use."""
    new_plan_needs_it: bool = True

    def of(self, plan: Plan) -> Value:
        """Return its value in a plan."""
        value = attrgetter(self.field)(plan)
        return _decimal(value, self.unit) if self.kind is Decimal else value

    def put(self, plan: Plan, value: Value) -> None:
        """Set it in a plan."""
        *way, last = self.field.split(".")
        target = attrgetter(way[0])(plan) if way else plan
        setattr(target, last, _whole(value, self.unit) if isinstance(value, Decimal) else value)


_KEYS: Sequence[_Key] = (
    _Key(
        name="minutes",
        field="quota_ms",
        kind=Decimal,
        unit=60_000,
        most=_LARGEST,
        meaning="GPU minutes of fast a month",
    ),
    _Key(
        name="rollover_minutes",
        field="rollover_ms",
        kind=Decimal,
        unit=60_000,
        most=_LARGEST,
        meaning="most of them that are carried into the next month",
        new_plan_needs_it=False,
    ),
    _Key(
        name="price",
        field="price_micros",
        kind=Decimal,
        unit=1_000_000,
        most=_LARGEST,
        meaning="of a month",
        new_plan_needs_it=False,
    ),
    _Key(name="currency", field="currency_code", kind=str, meaning="of all prices, as USD"),
    _Key(
        name="overage_price",
        field="overage_micros_per_minute",
        kind=Decimal,
        unit=1_000_000,
        most=_LARGEST,
        meaning="of a GPU minute beyond the plan's; 0: none to be had",
    ),
    _Key(name="running", field="limits.running", kind=Decimal, meaning="jobs running at once"),
    _Key(name="relax_running", field="limits.relax_running", kind=Decimal, meaning="of those, relax"),
    _Key(name="accepted", field="limits.accepted", kind=Decimal, meaning="jobs running and waiting at once"),
    _Key(
        name="relax_weight",
        field="relax_weight_milli",
        kind=Decimal,
        unit=1_000,
        meaning="share of relax against other plans; 1 is usual",
    ),
    _Key(name="private", field="private_allowed", kind=bool, meaning="private mode"),
    _Key(
        name="private_multiplier",
        field="private_multiplier_bp",
        kind=Decimal,
        unit=_ONE_BP,
        meaning="what private jobs cost against public ones",
    ),
    _Key(
        name="self_service",
        field="self_service",
        kind=bool,
        meaning="accounts may change to it without an admin",
        new_plan_needs_it=False,
    ),
    _Key(
        name="keep_days",
        field="picture_retention_days",
        kind=Decimal,
        meaning="that pictures are kept after their job's end; 0: for ever",
        new_plan_needs_it=False,
    ),
)
_BY_NAME: Mapping[str, _Key] = {key.name: key for key in _KEYS}

KEYS_HELP = "\n\n".join(
    [
        *(f"{key.name}: {key.meaning}" for key in _KEYS),
        f"{_CLASSES}.TYPE: what a type of GPU costs against others; 1 takes it out",
    ]
)
"""What `darkroom admin plans set --help` says of keys."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key of a plan that becomes another, in words."""

    key: str
    before: str
    """Empty where the plan is new."""
    after: str


@dataclass(frozen=True, kw_only=True)
class PlanEdit:
    """What somebody wants of one plan: the keys they gave, and nothing of the others."""

    name: str
    """plans/{plan}"""
    values: Mapping[str, Value]
    classes: Mapping[str, Decimal]
    replaces_classes: bool
    """`classes` are all there shall be; otherwise the others stay."""
    etag: str = ""
    """Of the version that was read; empty: whatever is newest."""

    def on(self, plan: Plan) -> Plan:
        """Return the plan as it would be, still with the etag to replace it by."""
        made = Plan()
        made.CopyFrom(plan)
        made.name = self.name
        made.etag = self.etag or plan.etag
        for name, value in self.values.items():
            _BY_NAME[name].put(made, value)
        if self.replaces_classes:
            made.gpu_class_bp.clear()
        for device, factor in self.classes.items():
            made.gpu_class_bp[device] = _whole(factor, _ONE_BP)
        for device in [device for device, bp in made.gpu_class_bp.items() if bp == _ONE_BP]:
            del made.gpu_class_bp[device]  # the same as not to be named
        return made

    def new_plan(self) -> Plan:
        """Return a plan that is made of this alone. Raises PlanNotUnderstood if it needs more."""
        missing = [key for key in _KEYS if key.new_plan_needs_it and key.name not in self.values]
        plan = last_part(self.name)
        _refuse(
            f"There is no plan {plan} yet, and a new one needs all of its keys.",
            [
                Violation(field=f"{plan}.{key.name}", sentence=f"is missing: {key.meaning}.")
                for key in missing
            ],
        )
        made = self.on(Plan())
        made.etag = ""
        return made


def changes(before: Plan | None, after: Plan) -> list[Change]:
    """Return what becomes another, in the order in which it is written; `before` None: a new plan."""
    earlier = _written(before) if before is not None else {}
    later = _written(after)
    unnamed = "1" if before is not None else ""  # only types of GPU can be missing from one of the two
    return [
        Change(key=key, before=earlier.get(key, unnamed), after=later.get(key, "1"))
        for key in dict.fromkeys([*later, *earlier])
        if earlier.get(key) != later.get(key)
    ]


def to_toml(plans: Iterable[Plan]) -> str:
    """Return plans as a file that `read_file` takes."""
    parts = [_HEADING]
    for plan in plans:
        lines = [f"[{last_part(plan.name)}]", f"{_ETAG} = {_text(plan.etag)}"]
        lines += [f"{f'{key.name} = {_toml(key.of(plan))}':<30}# {key.meaning}" for key in _KEYS]
        classes = _classes(plan)
        if classes:
            lines += [f"[{last_part(plan.name)}.{_CLASSES}]    # what a type of GPU costs against others"]
            lines += [f"{_text(device)} = {factor}" for device, factor in classes.items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def read_file(path: Path) -> list[PlanEdit]:
    """Return what a file wants of its plans, in its order. Raises PlanNotUnderstood."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise PlanNotUnderstood(f"{path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanNotUnderstood(f"{path} is not valid TOML: {error}.") from error
    violations: list[Violation] = []
    edits: list[PlanEdit] = []
    for plan, table in tables.items():
        if isinstance(table, dict):
            edits.append(_edit(plan, table, violations))
        else:
            violations.append(
                Violation(field=plan, sentence="stands alone; a plan is a table: [basic], then its keys.")
            )
    _refuse(f"{path} has what no plan has.", violations)
    return edits


def read_words(plan: str, words: Iterable[str]) -> PlanEdit:
    """Return what `key=value` words want of a plan. Raises PlanNotUnderstood."""
    violations: list[Violation] = []
    table: dict[str, object] = {}
    classes: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            violations.append(Violation(field=word, sentence="has no value: type minutes=200."))
        elif key.startswith(f"{_CLASSES}."):
            classes[key.removeprefix(f"{_CLASSES}.")] = _typed(text)
        else:
            table[key] = text if key in _BY_NAME and _BY_NAME[key].kind is str else _typed(text)
    edit = _edit(plan, table | ({_CLASSES: classes} if classes else {}), violations)
    _refuse("That is not what a plan has.", violations)
    return PlanEdit(
        name=edit.name, values=edit.values, classes=edit.classes, replaces_classes=False, etag=edit.etag
    )


def nearest(text: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that says which of the known names may be meant, or else all of them."""
    near = difflib.get_close_matches(text, known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."


def _edit(plan: str, table: Mapping[str, object], violations: list[Violation]) -> PlanEdit:
    values: dict[str, Value] = {}
    classes: dict[str, Decimal] = {}
    etag = ""
    for name, value in table.items():
        field = f"{plan}.{name}"
        if name == _ETAG and isinstance(value, str):
            etag = value
        elif name == _CLASSES and isinstance(value, dict):
            for device, factor in value.items():
                number = _number(factor, _ONE_BP, _LARGEST_INT, f"{field}.{device}", violations)
                if number is not None:
                    classes[device] = number
        elif name in _BY_NAME:
            known = _value(_BY_NAME[name], value, field, violations)
            if known is not None:
                values[name] = known
        else:
            violations.append(Violation(field=field, sentence=_unknown(name)))
    return PlanEdit(
        name=plan_name(plan),
        values=values,
        classes=classes,
        replaces_classes=_CLASSES in table,
        etag=etag,
    )


def _unknown(name: str) -> str:
    known = [*_BY_NAME, _CLASSES, _ETAG]
    if name in (_CLASSES, _ETAG):
        return f"is a table, {_CLASSES}.TYPE = 2." if name == _CLASSES else 'is text in quotes, like "v1".'
    return f"is no key of a plan; {nearest(name, known)}"


def _value(key: _Key, value: object, field: str, violations: list[Violation]) -> Value | None:
    if key.kind is Decimal:
        return _number(value, key.unit, key.most, field, violations)
    if isinstance(value, bool | str) and isinstance(value, key.kind):
        return value
    wanted = "is true or false" if key.kind is bool else 'is text in quotes, like "USD"'
    violations.append(Violation(field=field, sentence=f"{wanted}, not {_shown(value)}."))
    return None


def _number(value: object, unit: int, most: int, field: str, violations: list[Violation]) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | Decimal) or not Decimal(value).is_finite():
        violations.append(Violation(field=field, sentence=f"is a number, not {_shown(value)}."))
        return None
    number = Decimal(value)
    if number < 0:
        violations.append(Violation(field=field, sentence=f"is not below 0, as {number} is."))
    elif number > most or _whole(number, unit) > most:
        violations.append(Violation(field=field, sentence=f"is at most {most // unit:,}."))
    elif abs(number * unit - _whole(number, unit)) > _NEAR:
        kept = "a whole number" if unit == 1 else f"counted in parts of 1/{unit:,}"
        violations.append(Violation(field=field, sentence=f"is {kept}; {number} is finer than that."))
    else:
        return number
    return None


def _typed(text: str) -> object:
    """Return what was typed as TOML would have it; what is neither a number nor a truth is text."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return Decimal(text)
    except InvalidOperation:
        return text


def _written(plan: Plan) -> dict[str, str]:
    keys = {key.name: _toml(key.of(plan)) for key in _KEYS}
    return keys | {f"{_CLASSES}.{device}": str(factor) for device, factor in _classes(plan).items()}


def _classes(plan: Plan) -> dict[str, Decimal]:
    return {
        device: _decimal(bp, _ONE_BP) for device, bp in sorted(plan.gpu_class_bp.items()) if bp != _ONE_BP
    }


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _text(value) if isinstance(value, str) else str(value)


def _text(text: str) -> str:
    # A JSON string of printable characters is a TOML string too, and the service takes no others.
    return json.dumps(text, ensure_ascii=False)


def _shown(value: object) -> str:
    return _toml(value) if isinstance(value, bool | str | Decimal) else str(value)


def _decimal(whole: int, unit: int) -> Decimal:
    value = (Decimal(whole) / unit).quantize(_DIGITS)
    return value.quantize(Decimal(1)) if value == value.to_integral_value() else value.normalize()


def _whole(value: Decimal, unit: int) -> int:
    return int((value * unit).to_integral_value())


def _refuse(happened: str, violations: Sequence[Violation]) -> None:
    if violations:
        raise PlanNotUnderstood(happened, Details(violations=tuple(violations)))
