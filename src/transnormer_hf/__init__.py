"""TransNormer for Hugging Face Transformers. Importing this package registers its models with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from .model.cache_transnormer import TransNormerCache
from .model.configuration_transnormer import CODE_VERSION, TransNormerConfig
from .model.modeling_transnormer import (
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForMultipleChoice,
    TransNormerForQuestionAnswering,
    TransNormerForSequenceClassification,
    TransNormerForTokenClassification,
    TransNormerModel,
    TransNormerPreTrainedModel,
)
from .model.ops_transnormer import diag_attention, norm_attention, simple_rms_norm

__version__ = CODE_VERSION

AUTO_CLASSES = {
    AutoModelForTextEncoding: TransNormerModel,
    AutoModel: TransNormerModel,
    AutoModelForCausalLM: TransNormerForCausalLM,
    AutoModelForMaskedLM: TransNormerForMaskedLM,
    AutoModelForSequenceClassification: TransNormerForSequenceClassification,
    AutoModelForTokenClassification: TransNormerForTokenClassification,
    AutoModelForQuestionAnswering: TransNormerForQuestionAnswering,
    AutoModelForMultipleChoice: TransNormerForMultipleChoice,
}

AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig, exist_ok=True)
TransNormerConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    _auto_class.register(TransNormerConfig, _model_class, exist_ok=True)
    # Makes save_pretrained write the code beside the weights.
    _model_class.register_for_auto_class(_auto_class.__name__)
# Of the two, the one that was saved. An auto_map can name one only, so that remote code goes without.
AutoModelForPreTraining.register(TransNormerConfig, (TransNormerForMaskedLM, TransNormerForCausalLM), exist_ok=True)


try:
    from peft import utils as peft_utils
except ImportError:  # peft is not installed
    pass
else:
    # The modules that LoraConfig() and IA3Config() adapt where the user names none. peft has no call to register them;
    # its tuners look them up by model type in these tables, which peft.utils exports.
    for _table, _modules in {
        "LORA_TARGET": ["q_proj", "v_proj"],
        "IA3_TARGET": ["k_proj", "v_proj", "down_proj"],
        "IA3_FEEDFORWARD": ["down_proj"],
    }.items():
        _defaults = getattr(peft_utils, f"TRANSFORMERS_MODELS_TO_{_table}_MODULES_MAPPING")
        _defaults.setdefault(TransNormerConfig.model_type, _modules)

__all__ = [
    "TransNormerCache",
    "TransNormerConfig",
    "TransNormerForCausalLM",
    "TransNormerForMaskedLM",
    "TransNormerForMultipleChoice",
    "TransNormerForQuestionAnswering",
    "TransNormerForSequenceClassification",
    "TransNormerForTokenClassification",
    "TransNormerModel",
    "TransNormerPreTrainedModel",
    "diag_attention",
    "norm_attention",
    "simple_rms_norm",
]
