from .source import PACKAGE_PREFIX as PACKAGE_PREFIX
from .source import ReadTensor as ReadTensor
from .source import Weights as Weights
from .source import open_weights as open_weights
from .source import resolve_source as resolve_source
from .source import sha256_of as sha256_of
