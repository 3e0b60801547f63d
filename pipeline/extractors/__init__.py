"""Extractors: what turns images or sequences into the features that scores are computed from.

One module makes each kind: `classifier` and `self_supervised` are small networks that learn from
the data set (`training.py`), `inception` is the network of published scores, `own` is the user's.
All are stored by the step `features` and loaded back here (`loading.py`); what a score in their
features is called is in `naming.py`. Which features are there already is in `feature_cache.py`.
"""

from pipeline.extractors.loading import Extractor, extract, load_extractor
from pipeline.extractors.naming import ARTIFACT, extractor_key, score_name

__all__ = ["ARTIFACT", "Extractor", "extract", "extractor_key", "load_extractor", "score_name"]
