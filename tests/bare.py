"""Import this before a module of the package that needs no transformers: it puts the package there without `__init__`.

For processes of the tests; importing transformers takes seconds of CPU time in each.
"""

import importlib.util
import sys
import types

spec = importlib.util.find_spec("lolcats")
assert spec is not None and "lolcats" not in sys.modules
package = types.ModuleType("lolcats")
package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
sys.modules["lolcats"] = package
