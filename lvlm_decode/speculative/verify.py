"""What of a draft is accepted, given what the target chooses at its rows.

The rule is *accept if equal*: at each row the target's own choice is worked out from that row's mitigated scores; the walk
goes from the root to the child that equals the choice, as long as there is one, and the choice at the last row comes out
as a bonus.

Greedy: the choice is the arg max, a function of the prefix, so by induction the output is that of decoding without a
draft, whatever was drafted. Sampling: the choice is ``argmax(log p + G)`` with Gumbel noise ``G`` keyed by sample and
position (see ``engine.sampling``). Given the noise it is again a function of the prefix, so the same proof holds path by
path, and the output equals undrafted sampling with the same seed token for token (the drafter-invariant coupling of
arXiv 2408.07978). The familiar rule with probability min(1, p/q) has the same law but not the same tokens, and may not
be mixed with shared noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .tree import Shape


def walk(
    shape: Shape, tokens: Sequence[int], choose: Callable[[int], int], emit: Callable[[int], bool]
) -> tuple[list[int], bool]:
    """Walk down the accepted path, handing out every token it commits.

    Args:
        shape: the draft's shape.
        tokens: (n,) the draft's tokens; the first is the root.
        choose: row -> the token the target chooses there; asked along the path alone.
        emit: takes each committed token in order, accepted ones and the bonus, and says whether the text ends there.

    Returns:
        The accepted rows, the root first, and whether the text ended.
    """
    path, row = [0], 0
    while True:
        chosen = choose(row)
        ended = emit(chosen)
        row = next((child for child in shape.children[row] if tokens[child] == chosen), -1)
        if row < 0:
            return path, ended
        path.append(row)
        if ended:
            return path, True
