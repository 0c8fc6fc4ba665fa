"""Recipes, overrides and run folders."""

from run_configs import started

from bad_inputs.case import Case, Place

_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
_RUN = "run: {folder: x}\n"


def _recipe(name: str, expected: str, content: str | bytes) -> Case:
    return Case(name, expected, lambda place: place.recipe(content))


def _override(name: str, expected: str, *overrides: str) -> Case:
    return Case(name, expected, lambda place: place.doctor(*overrides))


def _broken_link(place: Place) -> list[str]:
    path = place.given / "run.yaml"
    path.symlink_to("/proc/self/mem")  # a file that nobody can read, root neither
    return ["distill", "doctor", "--config", str(path)]


def _file_as_folder(place: Place) -> list[str]:
    return place.doctor(run__folder=str(place.file("taken", "x")))


def _below_a_file(place: Place) -> list[str]:
    return place.doctor(run__folder=str(place.file("taken", "x") / "runs/1"))


def _linked_to_nothing(place: Place) -> list[str]:
    (place.given / "link").symlink_to("/nowhere/at/all")
    return place.doctor(run__folder=str(place.given / "link"))


def _broken_copy(place: Place) -> list[str]:
    """A run that has begun, and whose resolved settings were damaged since."""
    good = place.good | {"run": {"folder": str(place.given / "run")}}
    started(good)
    (place.given / "run/config.yaml").write_text("run: {")
    return place.doctor(run=good["run"])


_FILE = "--config = 'GIVEN/run.yaml"
CONFIGS = [
    Case("no such recipe", "--config = 'x.yaml': no such file", lambda _: ["distill", "doctor", "--config", "x.yaml"]),
    Case("a folder", "--config = 'GIVEN': is a folder", lambda p: ["distill", "doctor", "--config", str(p.given)]),
    Case("an unreadable file", f"{_FILE}': cannot be read", _broken_link),
    _recipe("an empty file", f"{_FILE}': holds no settings", ""),
    _recipe("a comment alone", f"{_FILE}': holds no settings", "# nothing\n"),
    _recipe("a list on top", f"{_FILE}': holds no settings", "- run\n- student\n"),
    _recipe("a word", f"{_FILE}': holds no settings", "hello"),
    _recipe("a tab", f"{_FILE}:2': not valid YAML (found character '\\t'", "run:\n\tfolder: x\n"),
    _recipe("an open bracket", f"{_FILE}:2': not valid YAML", "run: {folder: x\nstudent: y\n"),
    _recipe("two documents", f"{_FILE}:2': not valid YAML", f"{_RUN}---\n{_RUN}"),
    _recipe("a section twice", f"{_FILE}:2': the key 'run' stands twice in one section", _RUN + _RUN),
    _recipe("a key twice", f"{_FILE}:3': the key 'seed' stands twice", "run:\n  seed: 1\n  seed: 2\n"),
    _recipe("Latin-1", f"{_FILE}:2': not UTF-8", b"run:\n  folder: caf\xe9\n"),
    _recipe("UTF-16", f"{_FILE}:1': not UTF-8", _RUN.encode("utf-16")),
    _recipe("a NUL", f"{_FILE}': not valid YAML", "run: {folder: x\0}\n"),
    _recipe("a Python object", f"{_FILE}:1': not valid YAML", "run: !!python/object/apply:os.system ['touch PWNED']\n"),
    _recipe("a bomb of aliases", f"{_FILE}:5': holds more than 10000 values", _BOMB),
    _recipe("a list of itself", f"{_FILE}:1': holds more than 10000 values", "run: &a [*a]\n"),
    _recipe("too deep", f"{_FILE}': nested too deeply", "[" * 5000),
    _recipe("no such day", f"{_FILE}': not valid YAML (month must be in 1..12)", "run: 2000-13-01\n"),
    _recipe("no mapping key", f"{_FILE}:1': not valid YAML (found unhashable key)", "{{a: 1}: 2}"),
    _recipe("too long", f"{_FILE}': is longer than 1 MiB", "# " + "x" * 2**20),
    _recipe("nothing but a run", "student = None: missing; add it", _RUN),
    Case("no teacher", "teacher = None: objective minillm needs a teacher", lambda p: p.doctor(teacher=None)),
    _override("a misspelt section", "rolout = {'alpha': 0}: unknown key; did you mean 'rollout'?", "rolout.alpha=0"),
    _override("a misspelt key", "optim.warmup = 3: unknown key; did you mean 'warmup_steps'?", "optim.warmup=3"),
    _override("a section as a value", "optim = 3: is no section of settings", "optim=3"),
    _override("an empty section", "rollout = None: is no section of settings", "rollout="),
    _override("a number as an objective", "objective = 5: is no section", "objective=5"),
    _override("a number as a path", "student.path = 5: input should be a valid string", "student.path=5"),
    _override("no path", "run.folder = None: is no path", "run.folder="),
    _override("an empty path", "run.folder = '': names nothing", "run.folder=''"),
    _override("a home of the shell's", "run.folder = '~/x': ~ is the shell's", "run.folder='~/x'"),
    _override("a NUL in a path", "run.folder = 'a\\x00b': holds a character", 'run.folder="a\\0b"'),
    _override("half a pair", "log.project = '\\ud800': holds half a surrogate pair", 'log.project="\\ud800"'),
    _override("a path too long", "is longer than a path can be", f"run.folder={'a' * 300}"),
    _override("a password", "student.path = 'https://***@h/m': is an address", "student.path=https://me:secret@h/m"),
    _override("a key in an override", "log.api_key = '***': unknown key", "log.api_key=0123456789abcdef"),
    _override("NaN", "optim.lr = nan: input should be a finite number", "optim.lr=.nan"),
    _override("infinity", "optim.clip_norm = inf: input should be a finite number", "optim.clip_norm=.inf"),
    _override("yes for a number", "optim.steps = True: is no switch; YAML reads yes", "optim.steps=yes"),
    _override("off for a mode", "log.wandb = False: is no switch", "log.wandb=off"),
    _override("a word for a switch", "student.trust_remote_code = 'maybe'", "student.trust_remote_code=maybe"),
    _override("a negative size", "optim.batch_size = -8: input should be greater than 0", "optim.batch_size=-8"),
    _override("no metric", "evaluation.metric = 'bleu': input should be 'auto', 'loss'", "evaluation.metric=bleu"),
    _override(
        "no patience to have", "evaluation.patience = 2: the run is validated at its end", "evaluation.patience=2"
    ),
    _override("half a validation", "evaluation.patience = 0.5: input should be a valid int", "evaluation.patience=0.5"),
    _override("no response", "evaluation.seeds = 0: input should be greater than 0", "evaluation.seeds=0"),
    _override(
        "a wish without patience",
        "evaluation.min_improvement = 1.0: only evaluation.patience reads it",
        "evaluation.min_improvement=1",
    ),
    _override("a folder for TensorBoard", "log.tensorboard = 'runs/x'", "log.tensorboard=runs/x"),
    _override("a fraction of a step", "optim.steps = 2.5: input should be a valid integer", "optim.steps=2.5"),
    _override("a word for a number", "optim.lr = 'fast': input should be a valid number", "optim.lr=fast"),
    _override(
        "a number too large", "optim.steps = 99999999999999999999: is too large", "optim.steps=99999999999999999999"
    ),
    _override("a seed too large", "run.seed = 4294967296: input should be less than 4294967296", "run.seed=4294967296"),
    _override("a wait too long", "parallel.timeout_minutes = 1000000000", "parallel.timeout_minutes=1000000000"),
    _override("a beta of 2", "optim.betas.0 = 2: input should be less than 1", "optim.betas=[2, 0.9]"),
    _override("octal", "optim.steps = '010': 010 is another number in YAML than it looks", "optim.steps=010"),
    _override("base 60", "optim.max_minutes = '1:30': 1:30 is another number", "optim.max_minutes=1:30"),
    _override("a list as a preset", "objective.preset = []: input should be 'default'", "objective.preset=[]"),
    _override("no equals sign", "override = 'optim.lr': not of the form section.key=value", "optim.lr"),
    _override("no key", "override = '=3': not of the form section.key=value", "=3"),
    _override("half a key", "override = 'optim.=3': not of the form section.key=value", "optim.=3"),
    _override("through a value", "optim.lr.x = '1': 'lr' is a value, not a section", "optim.lr=1", "optim.lr.x=1"),
    _override("half a value", "optim.lr = '[': not valid YAML", "optim.lr=["),
    _override("a value twice", "the key 'name' stands twice", "objective={name: kd, name: sft}"),
    _override("an escape", "optim.\\x1b[31m = 1: unknown key", "optim.\x1b[31m=1"),
    Case("a run with a broken copy", "--config = 'GIVEN/run/config.yaml:1': not valid YAML", _broken_copy),
    Case("a run folder that is a file", "run.folder = 'GIVEN/taken': is a file", _file_as_folder),
    Case("a run folder below a file", "GIVEN/taken is a file; name another folder", _below_a_file),
    Case("a run folder that leads nowhere", "run.folder = 'GIVEN/link': is a link to nothing", _linked_to_nothing),
    Case(
        "a batch that does not divide",
        "optim.batch_size = 9: does not divide",
        lambda p: p.doctor("optim.batch_size=9"),
    ),
]
