from .calibrate import observe_rounds as observe_rounds
from .check import divergence as divergence
from .pipeline import build as build
from .pipeline import export as export
from .probes import TargetProbe as TargetProbe
from .recipe import RECIPE_FOLDER as RECIPE_FOLDER
from .recipe import Recipe as Recipe
from .recipe import load_recipe as load_recipe
