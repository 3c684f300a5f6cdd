"""What travels on the control connections. Each module has one conversation, and all names are here, too."""

from memfaas.messages.donor import *
from memfaas.messages.function import *
from memfaas.messages.handshake import *
from memfaas.messages.leases import *
from memfaas.messages.move import *
from memfaas.messages.overview import *
from memfaas.messages.reclaim import *
from memfaas.messages.session import *
from memfaas.messages.wire import *
