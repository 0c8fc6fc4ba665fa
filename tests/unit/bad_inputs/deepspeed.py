"""DeepSpeed JSON."""

from bad_inputs.case import Case

_FILE = "parallel.deepspeed = 'GIVEN/ds.json': "
_ZERO = "zero_optimization"


def _json(name: str, expected: str, content: str | bytes) -> Case:
    return Case(name, expected, lambda place: place.deepspeed(content))


def _zero(name: str, expected: str, content: str) -> Case:
    return _json(name, f"{_ZERO}{expected}", f'{{"{_ZERO}": {content}}}')


DEEPSPEED = [
    Case(
        "no such JSON",
        "parallel.deepspeed = '/no.json': no such file",
        lambda p: p.doctor(parallel__deepspeed="/no.json"),
    ),
    Case("a folder", "parallel.deepspeed = 'GIVEN': is a folder", lambda p: p.doctor(parallel__deepspeed=str(p.given))),
    _json("an empty file", f"{_FILE}not valid JSON", ""),
    _json("half an object", f"{_FILE}not valid JSON", "{"),
    _json("a comment", f"{_FILE}not valid JSON", "// mine\n{}"),
    _json("bytes that are no text", f"{_FILE}not valid JSON", b"\xff\xfe{}"),
    _json("a list", f"{_FILE}not a JSON object", "[1]"),
    _json(
        "a key twice",
        f"{_FILE}not valid JSON (the key '{_ZERO}' stands twice)",
        f'{{"{_ZERO}": {{}}, "{_ZERO}": {{}}}}',
    ),
    _json("NaN", f"{_FILE}not valid JSON (NaN is no JSON)", '{"gradient_clipping": NaN}'),
    _json("too deep", f"{_FILE}not valid JSON", '{"a":' * 100_000),
    _zero("a switch for ZeRO", " = True: in GIVEN/ds.json; give an object", "true"),
    _zero("a number for ZeRO", " = 3: in GIVEN/ds.json; give an object", "3"),
    _zero("stage 7", ".stage = 7: in GIVEN/ds.json; give 0, 1, 2 or 3", '{"stage": 7}'),
    _zero("a stage that is a word", ".stage = '3': in GIVEN/ds.json; give 0, 1, 2 or 3", '{"stage": "3"}'),
    _zero("a stage that is a switch", ".stage = True: in", '{"stage": true}'),
    _zero("a stage that is a fraction", ".stage = 3.0: in", '{"stage": 3.0}'),
    _zero("an unknown key", ".stage3_bucket = 1: in GIVEN/ds.json: extra inputs", '{"stage": 3, "stage3_bucket": 1}'),
    _zero("a negative bucket", ".reduce_bucket_size = -1: in", '{"stage": 3, "reduce_bucket_size": -1}'),
    _zero("a word for a bucket", ".allgather_bucket_size = 'big'", '{"stage": 2, "allgather_bucket_size": "big"}'),
    _zero(
        "a bad offload device",
        ".offload_optimizer.device = 'tpu'",
        '{"stage": 3, "offload_optimizer": {"device": "tpu"}}',
    ),
    _zero("a word for an offload", ".offload_param = 'cpu'", '{"stage": 3, "offload_param": "cpu"}'),
    _zero(
        "overlap at stage 1",
        ".overlap_comm = True: works with stages 2 and 3 only",
        '{"stage": 1, "overlap_comm": true}',
    ),
    _json(
        "both precisions",
        "fp16.enabled = True: in GIVEN/ds.json, where bf16 is enabled too; leave both to the recipe",
        '{"fp16": {"enabled": true}, "bf16": {"enabled": true}}',
    ),
    _json("a switch for fp16", "fp16 = True: in GIVEN/ds.json; give an object", '{"fp16": true}'),
    _json("a word for a scale", "fp16.loss_scale = 'big': in", '{"fp16": {"loss_scale": "big"}}'),
    _json(
        "a misspelt section",
        "zero_optimisation = {'stage': 3}: in GIVEN/ds.json; DeepSpeed does not read it; did you mean "
        "'zero_optimization'?",
        '{"zero_optimisation": {"stage": 3}}',
    ),
    _json("tensor parallelism", "tensor_parallel = {'autotp_size': 4}: in", '{"tensor_parallel": {"autotp_size": 4}}'),
]
