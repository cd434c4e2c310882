from .pipeline import train as train
