"""The attentions that TransNormer is compared with, each a token mixer in the same backbone.

Importing this package registers them with the Auto classes.

    from transformers import AutoConfig, AutoModelForMaskedLM
    from transnormer_hf.research.baselines import baseline_config

    config = AutoConfig.from_pretrained("model_cards/transnormer-t2-base")
    model = AutoModelForMaskedLM.from_config(baseline_config(config, "performer"))

A baseline is one file of this folder with a class under `@register_mixer("name")`: a `FeatureMixer` if it is linear
attention, a `BaselineAttention` if it needs more than queries, keys and values, else a `Mixer`. Every file here is
imported, so none has to be listed elsewhere. `paper_row_config` has the rows of Tables 4 and 5 at full size.
"""

import importlib
import pkgutil

from .mixer import MIXERS, BaselineAttention, FeatureMixer, Mixer, register_mixer
from .modeling import (
    BaselineConfig,
    BaselineForCausalLM,
    BaselineForMaskedLM,
    BaselineForMultipleChoice,
    BaselineForQuestionAnswering,
    BaselineForSequenceClassification,
    BaselineForTokenClassification,
    BaselineModel,
    baseline_config,
)
from .presets import paper_row_config

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "MIXERS",
    "BaselineAttention",
    "BaselineConfig",
    "BaselineForCausalLM",
    "BaselineForMaskedLM",
    "BaselineForMultipleChoice",
    "BaselineForQuestionAnswering",
    "BaselineForSequenceClassification",
    "BaselineForTokenClassification",
    "BaselineModel",
    "FeatureMixer",
    "Mixer",
    "baseline_config",
    "paper_row_config",
    "register_mixer",
]
