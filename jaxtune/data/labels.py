"""Labels of texts as numbers: classes by number or name, sets of classes, plain numbers."""

from typing import Any

from jaxtune.config import Config
from jaxtune.data.files import Row
from jaxtune.data.turns import number, short


def value(row: Row, label: Any, config: Config) -> float | tuple[float, ...]:
    """A row's label under the config's `problem_type`: the class number; 0 or 1 per class; or the number itself, or several.

    Several classes are a list of their names or numbers, or (as in transformers) a 0 or 1.0 for each class in order. Raises the row's error
    for any other label.
    """
    count = config.num_labels or 0
    if config.problem_type == "single_label_classification":
        return float(_class(row, label, config))
    if config.problem_type == "regression":
        numbers = [number(row, "the label", item) for item in (label if isinstance(label, list) else [label])]
        if len(numbers) != count:
            raise row.fail(f"the label has {len(numbers)} numbers, but num_labels is {count}")
        return numbers[0] if count == 1 else tuple(numbers)
    if not isinstance(label, list):
        raise row.fail(f"the label of a row that may have several must be a list, this is {short(label)}")
    if len(label) == count and all(isinstance(item, (bool, float)) or (item in (0, 1) and count > 2) for item in label):
        return tuple(float(bool(item)) for item in label)
    wanted = {_class(row, item, config) for item in label}
    return tuple(float(number in wanted) for number in range(count))


def _class(row: Row, label: Any, config: Config) -> int:
    names, count = list(config.id2label or ()), config.num_labels or 0
    if isinstance(label, str) and label in names:
        return names.index(label)
    number = int(label) if isinstance(label, str) and label.isdigit() else label  # CSV has only strings
    if isinstance(number, int) and 0 <= number < count:
        return int(number)
    known = f", or one of {', '.join(names)}" if names else "; for classes by name write id2label: [FIRST, SECOND, ...]"
    raise row.fail(f"the label must be the number of a class, from 0 to {count - 1}{known}; this is {short(label)}")
