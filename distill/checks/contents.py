"""Whether tokenised records hold what their manifest promises: token ids in lists that can be followed."""

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from distill.data.records import Manifest

# Of each folder so many rows are looked at; more would take longer than they are worth before every start.
_ROWS = 2**18
_IDS = ("prompt_ids", "response_ids", "input_ids")


def wrong_contents(rows: datasets.Dataset, manifest: Manifest, vocabulary: int | None) -> str | None:
    """What is wrong with the first rows; None: nothing."""
    table: pa.Table = rows.data.table.slice(0, _ROWS)
    try:
        table.validate(full=True)
    except pa.ArrowException as error:
        return f"damaged records ({str(error).splitlines()[0][:200]})"
    for name in [name for name in _IDS if name in table.column_names]:
        column = table[name]
        flat = pc.list_flatten(column)
        if table[name].null_count or flat.null_count:
            return f"damaged records ({name} has gaps)"
        if len(flat) and vocabulary is not None:
            least, most = pc.min_max(flat).as_py().values()
            if least < 0 or most >= vocabulary:
                outside = least if least < 0 else most
                return f"{name} holds the id {outside}, the tokenizer has 0 to {vocabulary - 1}"
        lengths = pc.min_max(pc.list_value_length(column)).as_py()
        if name == "prompt_ids" and lengths["min"] == 0:
            return "a prompt has no token"
        if name == "input_ids" and set(lengths.values()) != {manifest.settings.max_length}:
            return f"rows of {lengths['min']} to {lengths['max']} tokens, not {manifest.settings.max_length}"
    return None


def largest_id(rows: datasets.Dataset, column: str) -> int:
    """The largest token id in all rows of a column."""
    lists = rows.data.table[column].chunks
    return max((pc.max(chunk.flatten()).as_py() or 0 for chunk in lists), default=0)
