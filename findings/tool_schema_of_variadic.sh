#!/usr/bin/env bash
# transformers 5.23.0 (numpy 2.4.6, no torch): the schema of a tool whose Python function takes *args, **kwargs or a positional-only
# parameter, as a chat template shows it to the model.
#
# Expected: an array for *numbers, `additionalProperties` for **more, and a refusal of what no call with named arguments can reach.
# Seen: *numbers: float is one required number "numbers", and **more: int one required integer "more". A call that follows the schema
# fails for *numbers and for a positional-only parameter (TypeError: the name is no keyword), and for **more it arrives as the entry
# "more" of the mapping. A model that obeys its prompt gets an error for every call of such a tool.
# Fails if one of the schemas or one of the results changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 transformers==5.23.0
cd "$folder"
cat > tools.py <<'PY'
from transformers.utils import get_json_schema


def total(*numbers: float) -> float:
    """
    Add numbers.

    Args:
        numbers: The numbers to add.
    """
    return sum(numbers)


def options(**more: int) -> dict:
    """
    Set options.

    Args:
        more: Values by name.
    """
    return more


def double(value: int, /) -> int:
    """
    Double a number.

    Args:
        value: The number.
    """
    return 2 * value


found = {}
for function in (total, options, double):
    schema = get_json_schema(function)["function"]["parameters"]
    arguments = {name: 3 for name in schema["required"]}
    try:
        result = repr(function(**arguments))
    except TypeError as error:
        result = f"TypeError: {error}"
    kinds = {name: one["type"] for name, one in schema["properties"].items()}
    found[function.__name__] = (kinds, schema["required"], result.split(":")[0])
    print(f"{function.__name__}: {kinds}, required {schema['required']}; called with {arguments}: {result}")
assert found == {
    "total": ({"numbers": "number"}, ["numbers"], "TypeError"),
    "options": ({"more": "integer"}, ["more"], "{'more'"),
    "double": ({"value": "integer"}, ["value"], "TypeError"),
}, "the behaviour has changed"
print("as stated")
PY
"$folder/venv/bin/python" tools.py
