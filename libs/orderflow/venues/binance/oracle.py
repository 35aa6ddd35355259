"""Whether a local book is right, by the exchange's own best prices.

After a diff that ends at update id u, the best bid and ask of the book are those of the bookTicker with the greatest id
not above u. Which one that is, is known only once a quote beyond u has come (on recorded markets most diffs arrive
before it, and one in sixty before a quote that still belongs to it), so until then a diff's *claim* waits. Where a quote
was lost nothing is concluded about the ids from the quote before it up to the next.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, TypeAlias

from msgspec import Struct

Quote: TypeAlias = tuple[int, float, float, float, float]
"""(update id, bid, bid quantity, ask, ask quantity)."""
Claim: TypeAlias = tuple[int, float | None, float | None, float | None, float | None]
"""(`u` of a diff, the book's best after it): None where a side is empty."""

MAX_QUOTES: Final = 256
"""Quotes kept beyond the newest diff; on a recorded market with 1,500 frames/s 51 were the most."""
MAX_CLAIMS: Final = 64


class QuoteOracle(Struct, array_like=True):
    """One symbol's newest quotes and the claims that wait for the next one.

    Every claim is counted once, as checked or as skipped, or it waits.
    """

    quotes: list[Quote] = []
    """Rising ids. A bid of 0: a quote between this id and the next was lost."""
    claims: list[Claim] = []
    """Rising ids, none below the newest quote's."""
    checked: int = 0
    failed: int = 0
    """Of those checked, the ones that differed."""
    skipped: int = 0
    failed_in_row: int = 0
    """Quotes in a row that showed the book to be wrong: one lost quote can fail many claims."""
    failed_quote_id: int = -1

    def add_quote(self, quote: Quote) -> list[tuple[Claim, Quote]]:
        """Take a quote whose id is above all before; returns what it has shown to be wrong."""
        quotes, wrong = self.quotes, []
        if self.claims and self.claims[0][0] < quote[0]:
            wrong = self._settle(quote[0])
        quotes.append(quote)
        if len(quotes) > MAX_QUOTES:
            del quotes[: MAX_QUOTES // 2]
        return wrong

    def add_claim(self, claim: Claim) -> Quote | None:
        """Take the best of the book after a diff; returns the quote that shows it to be wrong."""
        quotes, update_id = self.quotes, claim[0]
        if not quotes or quotes[-1][0] < update_id:
            del quotes[:-1]
            self.claims.append(claim)
            if len(self.claims) > MAX_CLAIMS:
                self._give_up_oldest()
            return None
        place = bisect_right(quotes, (update_id, 1e308)) - 1
        if place < 0:
            self.skipped += 1
            return None
        del quotes[:place]
        return None if self._holds(claim, quotes[0]) else quotes[0]

    def lose_quote(self) -> None:
        """A quote behind the newest one was lost, or refused."""
        if self.quotes:
            self.quotes[-1] = (self.quotes[-1][0], 0.0, 0.0, 0.0, 0.0)
        self._skip_claims()

    def lose_late_quote(self, update_id: int) -> None:
        """A quote came out of its order, or once more."""
        place = bisect_right(self.quotes, (update_id, 1e308)) - 1
        if place >= 0 and self.quotes[place][0] != update_id:
            self.quotes[place] = (self.quotes[place][0], 0.0, 0.0, 0.0, 0.0)

    def restart(self) -> None:
        """Forget everything: ids have begun anew, or the book has."""
        self.quotes = []
        self._skip_claims()
        self.failed_in_row = 0

    def finish(self) -> list[tuple[Claim, Quote]]:
        """No more quotes will come: what waits is judged by the newest; returns what is wrong."""
        return self._settle(2**63)

    def _settle(self, below_id: int) -> list[tuple[Claim, Quote]]:
        """Judge the claims below an id by the newest quote, which is the last one that belongs to them."""
        claims = self.claims
        count = sum(claim[0] < below_id for claim in claims)
        due, self.claims = claims[:count], claims[count:]
        if not self.quotes:
            self.skipped += count
            return []
        newest = self.quotes[-1]
        return [(claim, newest) for claim in due if not self._holds(claim, newest)]

    def _holds(self, claim: Claim, quote: Quote) -> bool:
        """Whether a claim agrees with the quote that it belongs to, or can't be judged."""
        if quote[1] == 0.0:
            self.skipped += 1
            return True
        self.checked += 1
        if claim[1:] == quote[1:]:
            self.failed_in_row = 0
            return True
        self.failed += 1
        if quote[0] != self.failed_quote_id:
            self.failed_quote_id = quote[0]
            self.failed_in_row += 1
        return False

    def _give_up_oldest(self) -> None:
        """Too many wait: where the oldest agrees with the newest quote it is right, else a quote may be under way."""
        claim = self.claims.pop(0)
        if self.quotes and claim[1:] == self.quotes[-1][1:]:
            self.checked += 1
            self.failed_in_row = 0
        else:
            self.skipped += 1

    def _skip_claims(self) -> None:
        self.skipped += len(self.claims)
        self.claims = []
