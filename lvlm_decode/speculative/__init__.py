"""Speculative decoding that verifies the mitigated distribution.

``generate`` is the loop; ``tree``, ``verify``, ``choose`` and ``cache_ops`` are its parts, and ``handover`` ends it where a
drafter gives up; ``drafters`` propose and ``heads`` are the trained ones; ``show`` draws. A draft changes how fast an answer
comes, never the answer.
"""
