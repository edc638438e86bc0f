"""Says how it is run, as a child of the service does: one line of JSON."""

import json
import os
from pathlib import Path

of_session = Path("/proc/self/autogroup")
print(
    json.dumps(
        {
            "nice": os.nice(0),
            "leads_its_session": os.getsid(0) == os.getpid(),
            "session_nice": int(of_session.read_text().split()[-1]) if of_session.exists() else None,
        }
    )
)
