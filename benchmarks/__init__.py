"""Measured claims, each one command; nothing imports them.

All of them run with the processor's settings that the command line has, which must be there before
torch is loaded, so this package sets them where it is imported.
"""

import os

from shike_core.environment import CPU_SETTINGS

for _name, _value in CPU_SETTINGS.items():
    os.environ.setdefault(_name, _value)
