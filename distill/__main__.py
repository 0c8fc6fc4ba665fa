"""`python -m distill VERB …`."""

from distill.cli import main
from distill.console import leave

leave(main())
