"""``python -m opd_gym.cli`` is ``opd-gym``."""

import sys

from opd_gym.cli.main import main

sys.exit(main())
