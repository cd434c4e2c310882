"""What `auto` may lose, in plain steps by the cost table. docs/scheduling.md derives the bound."""

CREDIT = 3.0  # by drafts that seem to pay, and by the first looks
SHARE = 0.005  # of every plain step, by looking from then on
MOST_SAVED = 8.0  # of what drafting gained

EVIDENCE = 24  # blocks of this run, without which a promise is the export's
LOOKING = 4  # rows that are drafted to look
HURDLE = 1.02  # times plain decoding, that drafting must promise to begin with
GRAIN = 16  # cached tokens by which prices are told apart
