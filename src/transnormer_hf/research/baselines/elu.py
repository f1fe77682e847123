"""Scaled linear attention with phi = 1 + elu (Katharopoulos et al., https://arxiv.org/abs/2006.16236)."""

from ...model.reference_transnormer import apply_feature_map
from .mixer import FeatureMixer, register_mixer


@register_mixer("1+elu")
class EluMixer(FeatureMixer):
    def features(self, query, key, metadata, causal):
        return apply_feature_map(query, "1+elu"), apply_feature_map(key, "1+elu")
