"""The Python interface that others may rely on: where each name is, and what it is called with.

The signatures are those of commit df90fa7. What a name does is in the tests of its module. They are read from the source, since
to import torch and TRL would take longer than all that is asked here.
"""

import ast
import subprocess
import sys

import pytest
from mini import ROOT

SIGNATURES = {
    "selfplay.config.load": "path, overrides=()",
    "selfplay.methods.potential.alignment_potential": "explicit, implicit, weight=1.0, *, reference=None",
    "selfplay.methods.potential.keep_top": "score, ratio",
    "selfplay.methods.depth.allocate": "closeness, pool, budget, temperature",
    "selfplay.methods.depth.cluster": "features, clusters, seed",
    "selfplay.methods.epsilon_dpo.epsilon_steps": "logratio, logratio_plus, logratio_minus",
    "selfplay.methods.epsilon_dpo.next_beta": "beta, mean_step, epsilon",
    "selfplay.methods.epsilon_dpo.fused_logps": "hidden, weight, ref_hidden, ref_weight, targets, epsilon, **options",
    "selfplay.methods.features.pair_features": "model, batch, dim, seed, *, layers=None, reference=None, **loss",
    "selfplay.training.epsilon_dpo.EpsilonDPOTrainer.__init__": "self, model, ref_model=None, args=None, data_collator=None, "
    "train_dataset=None, *rest, **kwargs",
    "reward.client.RewardClient.score": "self, items, on_progress=None, *, references=None, on_scored=None, known=()",
}
FIELDS = {
    "selfplay.training.epsilon_dpo.EpsilonDPOConfig": "epsilon=0.01 beta_min=None beta_max=None nll_weight=0.0 bf16=False "
    "gradient_checkpointing=False max_length=None logging_nan_inf_filter=False",
}
OPTIONS_OF_A_CLIENT = (
    "dialect='selfplay', tokenizer=None, model=None, api_key=None, batch_size=128, batch_bytes=8 * 2 ** 20, concurrency=4, "
    "timeout=120.0, deadline=300.0, first_wait=0.5, longest_wait=15.0"
)


def found(name: str) -> ast.AST:
    """The definition of a name, in its own module or in the one that its package has it from."""
    *module, _ = name.split(".")
    while not (path := ROOT.joinpath(*module).with_suffix(".py")).is_file():
        if (package := ROOT.joinpath(*module) / "__init__.py").is_file():
            path = package
            break
        module.pop()
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split(".")[len(module) :]:
        for each in ast.iter_child_nodes(node):
            if isinstance(each, ast.ImportFrom) and part in [alias.name for alias in each.names]:
                return found(f"{each.module}.{part}")
            if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == part:
                node = each
                break
        else:
            raise AssertionError(f"{name} is not there")
    return node


def signature(name: str) -> tuple[list[str], dict[str, str]]:
    """Everything but the options that only go by name, and those with their defaults, both without types."""
    node = found(name)
    assert isinstance(node, ast.FunctionDef)
    for each in ast.walk(node.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    options = {a.arg: ast.unparse(d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d}
    return ast.unparse(node.args).split(", "), options


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert ", ".join(signature(name)[0]) == SIGNATURES[name]


def test_the_client_has_these_options_and_may_have_more():
    words, options = signature("reward.client.RewardClient.__init__")
    assert words[:3] == ["self", "url", "*"]
    assert options.items() >= dict(each.split("=") for each in OPTIONS_OF_A_CLIENT.split(", ")).items()


@pytest.mark.parametrize("name", FIELDS)
def test_settings_of_the_trainer(name):
    fields = [each for each in found(name).body if isinstance(each, ast.AnnAssign)]
    defaults = [next(ast.unparse(k.value) for k in each.value.keywords if k.arg == "default") for each in fields]
    assert FIELDS[name].split() == [f"{each.target.id}={value}" for each, value in zip(fields, defaults, strict=True)]


def test_the_package_alone_is_light():
    code = "import sys; before = {*sys.modules}; import selfplay; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["selfplay"]
