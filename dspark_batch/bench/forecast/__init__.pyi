from .question import Question as Question
from .question import forecast as forecast
