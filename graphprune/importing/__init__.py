"""Recipes and configurations of other tools, read into recipes of this one."""

from graphprune.importing.fields import NotCarried
from graphprune.importing.importer import Imported, import_recipe
from graphprune.importing.inc_config import write_inc_config

__all__ = ["Imported", "NotCarried", "import_recipe", "write_inc_config"]
