"""torch's optimizers and the arguments beside ``lr`` with which tests try them."""

ELEMENTWISE = {
    "Adadelta": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {"t0": 2},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
}
"""They update each number from its own gradient, so any part of a parameter may be trained on its own."""

OPTIMIZERS = {**ELEMENTWISE, "Adafactor": {}, "Muon": {}}
"""All that step without a closure and with dense gradients: not LBFGS and SparseAdam."""
