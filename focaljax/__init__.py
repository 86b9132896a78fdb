"""Losses for imbalanced data in JAX: focal, soft truncation, hard threshold."""

from focaljax._balance import class_balanced_weights as class_balanced_weights
from focaljax._balance import prior_bias as prior_bias
from focaljax._balance import prior_bias_init as prior_bias_init
from focaljax._losses import focal_modulation as focal_modulation
from focaljax._losses import hard_threshold_modulation as hard_threshold_modulation
from focaljax._losses import soft_truncation_modulation as soft_truncation_modulation
from focaljax._pointwise import sigmoid as sigmoid
from focaljax._pointwise import softplus as softplus
from focaljax._posterior import decision_threshold as decision_threshold
from focaljax._posterior import sigmoid_posterior as sigmoid_posterior
from focaljax._posterior import sigmoid_posterior_logits as sigmoid_posterior_logits
from focaljax._posterior import sigmoid_prior_shift as sigmoid_prior_shift
from focaljax._posterior import softmax_posterior as softmax_posterior
from focaljax._posterior import softmax_posterior_logits as softmax_posterior_logits
from focaljax._posterior import softmax_prior_shift as softmax_prior_shift
from focaljax._reduce import normalize_by_positives as normalize_by_positives
from focaljax._reduce import reduce_mean as reduce_mean
from focaljax._sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
from focaljax._sigmoid import sigmoid_hard_threshold_loss as sigmoid_hard_threshold_loss
from focaljax._sigmoid import sigmoid_margin as sigmoid_margin
from focaljax._sigmoid import sigmoid_margin_loss as sigmoid_margin_loss
from focaljax._sigmoid import sigmoid_soft_truncation_loss as sigmoid_soft_truncation_loss
from focaljax._softmax import softmax_focal_loss as softmax_focal_loss
from focaljax._softmax import softmax_hard_threshold_loss as softmax_hard_threshold_loss
from focaljax._softmax import softmax_margin as softmax_margin
from focaljax._softmax import softmax_margin_loss as softmax_margin_loss
from focaljax._softmax import softmax_soft_truncation_loss as softmax_soft_truncation_loss
from focaljax._softmax import su_softmax_soft_truncation_loss as su_softmax_soft_truncation_loss

__version__ = "0.2.0"
