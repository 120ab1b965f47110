"""The table of architectures: which rows and columns of which modules form the units.

    language   what an entry can say
    table      the entries
    configs    what a model's config says, and which head counts its family takes
    views      the matrices that units lie on
    discovery  from a model and its entry to groups and config fields
    depth      whole layers: what leaves with them, and what follows their number and places
    support    the table as docs/models.md shows it

An architecture is an entry, not a class. Module names are relative to the decoder layer; widths are read from the
modules themselves, so a model that has been pruned already is described as it now is. See CONTRIBUTING.md for how to
add one.
"""

from .classes import auto_class, auto_class_name
from .configs import text_config
from .depth import check_depth, keep_layers, layer_parameters
from .discovery import adopt, architecture, config_widths, decoder, groups, head_dim, is_known, layers_of, left_alone
from .language import Alibi, Architecture, Attention, Experts, Gated, Mlp
from .table import TABLE
from .views import Matrix, linears, matrices, view

__all__ = [
    "TABLE",
    "Alibi",
    "Architecture",
    "Attention",
    "Experts",
    "Gated",
    "Matrix",
    "Mlp",
    "adopt",
    "architecture",
    "auto_class",
    "auto_class_name",
    "check_depth",
    "config_widths",
    "decoder",
    "groups",
    "head_dim",
    "is_known",
    "keep_layers",
    "layer_parameters",
    "layers_of",
    "left_alone",
    "linears",
    "matrices",
    "text_config",
    "view",
]
