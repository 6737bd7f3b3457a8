"""The evidence of one answer: what each view said, what the mask removed, what the method changed.

``lvlm_decode.explain`` decodes one answer with a recorder; :class:`Explanation` is what it returns, as data and as a page.
"""

from .explanation import Candidate, Draft, Explanation, Mask, Overlay, Returned, Row, Shown, Token

__all__ = ["Candidate", "Draft", "Explanation", "Mask", "Overlay", "Returned", "Row", "Shown", "Token"]
