"""What the shipped files lean on in transformers: the list of every name, so that a new one is a decision."""

import ast
import importlib.metadata
import importlib.util
import inspect
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

import transnormer_hf.model
from transnormer_hf import AUTO_CLASSES

MODEL = Path(transnormer_hf.model.__file__).parent
SHIPPED = sorted(MODEL.glob("*_transnormer.py"))

# module, name -> the first release of transformers 5 that has it there
IMPORTED = {
    ("transformers", "GenerationConfig"): "5.0.0",
    ("transformers", "GenerationMixin"): "5.0.0",
    ("transformers", "PreTrainedConfig"): "5.0.0",
    ("transformers", "PreTrainedModel"): "5.0.0",
    ("transformers", "__version__"): "5.0.0",
    ("transformers", "initialization"): "5.0.0",
    ("transformers.activations", "ACT2CLS"): "5.0.0",
    ("transformers.activations", "ACT2FN"): "5.0.0",
    ("transformers.cache_utils", "Cache"): "5.0.0",
    ("transformers.cache_utils", "CacheLayerMixin"): "5.0.0",
    ("transformers.cache_utils", "StaticCache"): "5.0.0",
    ("transformers.generation", "GenerationMode"): "5.0.0",
    ("transformers.loss.loss_utils", "ForCausalLMLoss"): "5.0.0",
    ("transformers.loss.loss_utils", "ForMaskedLMLoss"): "5.0.0",
    ("transformers.loss.loss_utils", "fixed_cross_entropy"): "5.0.0",
    ("transformers.modeling_layers", "GradientCheckpointingLayer"): "5.0.0",
    ("transformers.modeling_outputs", "BaseModelOutputWithPast"): "5.0.0",
    ("transformers.modeling_outputs", "CausalLMOutputWithPast"): "5.0.0",
    ("transformers.modeling_outputs", "MaskedLMOutput"): "5.0.0",
    ("transformers.modeling_outputs", "MultipleChoiceModelOutput"): "5.0.0",
    ("transformers.modeling_outputs", "QuestionAnsweringModelOutput"): "5.0.0",
    ("transformers.modeling_outputs", "SequenceClassifierOutput"): "5.0.0",
    ("transformers.modeling_outputs", "TokenClassifierOutput"): "5.0.0",
    ("transformers.processing_utils", "Unpack"): "5.0.0",
    ("transformers.utils", "TransformersKwargs"): "5.0.0",
    ("transformers.utils", "auto_docstring"): "5.0.0",
    ("transformers.utils", "can_return_tuple"): "5.0.0",
    ("transformers.utils", "logging"): "5.0.0",
    ("transformers.utils.generic", "merge_with_config_defaults"): "5.2.0",
    ("transformers.utils.output_capturing", "OutputRecorder"): "5.2.0",
    ("transformers.utils.output_capturing", "capture_outputs"): "5.2.0",
}

# Private names of transformers' classes that ours define, and why. None is imported.
OVERRIDDEN = {
    "_can_set_attn_implementation": "set_attn_implementation asks it; transformers greps the source otherwise",
    "_check_and_adjust_attn_implementation": "where attn_implementation arrives; without it 'sdpa' is refused and the"
    " default cannot be told from 'eager'",
    "_can_compile_fullgraph": "declares that a static cache may be compiled; no public name",
    "_can_record_outputs": "what output_attentions and its kind collect; every model of transformers sets it",
    "_init_weights": "the documented way to initialise a model of one's own",
    "_keep_in_fp32_modules_strict": "LRPE's angles stay float32 in a model loaded in half precision; no public name",
    "_no_split_modules": "device_map; every model of transformers sets it",
    "_prepare_cache_for_generation": "where `generate` makes its cache; without it the model adopts or refuses what"
    " comes, and generation from lost states is stopped",
    "_skip_keys_device_placement": "device_map; every model of transformers sets it",
    "_tied_weights_keys": "tied embeddings; every model of transformers sets it",
}
SET_BY_TRANSFORMERS = {"_auto_class", "_abc_impl"}  # by register_for_auto_class, by Python


def names_imported(path: Path) -> set[tuple[str, str]]:
    """(module, name) of each name that a file takes from transformers; `transformers.x` counts as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("transformers"):
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.startswith("transformers.")}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "transformers":
            found.add(("transformers", node.attr))
    return found


def test_every_name_that_is_imported_is_listed():
    imported = set().union(*map(names_imported, SHIPPED))
    assert imported - set(IMPORTED) == set(), "not in the list: add the name and the release that it exists since"
    assert set(IMPORTED) - imported == set(), "in the list, but no longer imported"


def test_no_private_name_is_imported():
    parts = {part for module, name in IMPORTED if name != "__version__" for part in (*module.split("."), name)}
    assert not {part for part in parts if part.startswith("_")}


@pytest.mark.parametrize(("module", "name"), IMPORTED)
def test_the_installed_release_has_the_name(module, name):
    assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")


def test_no_name_is_younger_than_the_lower_bound():
    requirements = map(Requirement, importlib.metadata.requires("transnormer-hf") or [])
    (bounds,) = (requirement.specifier for requirement in requirements if requirement.name == "transformers")
    (lowest,) = (Version(bound.version) for bound in bounds if bound.operator == ">=")
    assert max(map(Version, IMPORTED.values())) <= lowest <= Version(transformers.__version__)


def test_every_private_name_that_is_overridden_has_a_reason():
    classes = [
        value
        for path in SHIPPED
        if not path.stem.endswith("kernels_transnormer")
        for value in vars(importlib.import_module(f"transnormer_hf.model.{path.stem}")).values()
        if inspect.isclass(value) and value.__module__.startswith("transnormer_hf")
    ]
    assert set(AUTO_CLASSES.values()) <= set(classes)
    overridden = {
        name
        for ours in classes
        for host in ours.__mro__
        if host.__module__.split(".")[0] == "transformers"
        for name in vars(ours).keys() & vars(host).keys()
        if name.startswith("_") and not name.endswith("__")
    }
    assert overridden - SET_BY_TRANSFORMERS == set(OVERRIDDEN)
