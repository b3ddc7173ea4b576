"""The policy files give to whom the contract says, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

CHECKOUT = Path(__file__).parents[2]
POLICY = CHECKOUT / "polkit/com.sendense.restore1.policy"
RULES = CHECKOUT / "polkit/com.sendense.restore1.rules"
BUS_POLICY = CHECKOUT / "dbus/com.sendense.Restore1.conf"
PREFIX = "com.sendense.restore1."

# action: (any, inactive, active, group sendense-restore)
ACTIONS = {
    "list-backups": ("auth_admin", "auth_admin", "auth_admin_keep", "yes"),
    "mount": ("auth_admin", "auth_admin", "auth_admin_keep", "yes"),
    "read": ("yes", "yes", "yes", "yes"),
    "read-others": ("auth_admin", "auth_admin", "auth_admin_keep", ""),
    "unmount": ("yes", "yes", "yes", "yes"),
    "unmount-others": ("auth_admin", "auth_admin", "auth_admin", ""),
    "force-unmount": ("auth_admin", "auth_admin", "auth_admin", ""),
    "act-on-behalf": ("auth_admin", "auth_admin", "auth_admin", "yes"),
    "status": ("auth_admin_keep", "auth_admin_keep", "auth_admin_keep", "yes"),
    "shell": ("no", "no", "no", ""),
    "manage": ("auth_admin_keep", "auth_admin_keep", "auth_admin_keep", ""),
}


def actions() -> dict[str, ET.Element]:
    root = ET.parse(POLICY).getroot()
    return {action.get("id", "").removeprefix(PREFIX): action for action in root.iter("action")}


def test_the_policy_has_exactly_the_actions_of_the_contract() -> None:
    assert sorted(actions()) == sorted(ACTIONS)


@pytest.mark.parametrize("name", ACTIONS)
def test_defaults_are_those_of_the_contract(name: str) -> None:
    action = actions()[name]
    defaults = tuple(action.findtext(f"defaults/allow_{who}") for who in ("any", "inactive", "active"))
    assert defaults == ACTIONS[name][:3]


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_says_what_it_asks_for(name: str) -> None:
    action = actions()[name]
    assert action.findtext("description")
    message = action.findtext("message") or ""
    assert message.startswith("Authentication is required to ")


def test_a_comment_stands_over_each_action() -> None:
    text = POLICY.read_text(encoding="utf-8")
    assert len(re.findall(r"\?[^<>]*-->\n  <action id=", text)) == len(ACTIONS), "each comment asks a question"


def test_the_rule_grants_the_group_what_the_contract_says() -> None:
    granted = set(re.findall(r'"com\.sendense\.restore1\.([a-z-]+)"', RULES.read_text(encoding="utf-8")))
    assert granted == {name for name, (*_, group) in ACTIONS.items() if group == "yes"}


def test_the_rule_never_says_no() -> None:
    results = re.findall(r"polkit\.Result\.(\w+)", RULES.read_text(encoding="utf-8"))
    assert results == ["YES"]


def test_only_root_may_be_the_service() -> None:
    root = ET.parse(BUS_POLICY).getroot()
    owners = [
        (policy.attrib, rule.get("own")) for policy in root.iter("policy") for rule in policy if rule.get("own")
    ]
    assert owners == [({"user": "root"}, "com.sendense.Restore1")]


def test_everybody_may_call_the_service_and_nobody_may_signal_it() -> None:
    root = ET.parse(BUS_POLICY).getroot()
    default = root.find("policy[@context='default']")
    assert default is not None
    rules = [(rule.tag, rule.get("send_type")) for rule in default if not rule.get("min_fds")]
    assert rules == [("allow", "method_call"), ("deny", "signal")]
    assert {rule.get("send_destination") for rule in default} == {"com.sendense.Restore1"}
    assert default[1].get("send_broadcast") == "false", "polkit's own signals are broadcast and must come through"


def test_only_root_may_hand_descriptors_to_the_service() -> None:
    root = ET.parse(BUS_POLICY).getroot()
    denied = [rule.attrib for rule in root.iterfind("policy[@context='default']/deny") if rule.get("min_fds")]
    assert denied == [{"send_destination": "com.sendense.Restore1", "min_fds": "1"}]
    allowed = [rule.attrib for rule in root.iterfind("policy[@user='root']/allow") if rule.get("send_destination")]
    assert allowed == [{"send_destination": "com.sendense.Restore1", "send_type": "method_call"}]
