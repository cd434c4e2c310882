from .table import decoder_spec as decoder_spec
