// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

contract Counter {
    uint256 public count;

    event CounterIncremented(address indexed by, uint256 count);

    function increment() external {
        count += 1;
        emit CounterIncremented(msg.sender, count);
    }
}

contract MessageBoard {
    string public message;

    event MessageChanged(address indexed by, string message);

    function setMessage(string calldata message_) external {
        message = message_;
        emit MessageChanged(msg.sender, message_);
    }
}

contract DonationBox {
    mapping(address => uint256) public donations;

    event Donated(address indexed by, uint256 amount);

    function donate() external payable {
        require(msg.value > 0, "nothing to donate");
        donations[msg.sender] += msg.value;
        emit Donated(msg.sender, msg.value);
    }
}

contract FallbackReceiver {
    uint256 public received;

    event Received(address indexed from, uint256 amount);

    receive() external payable {
        received += msg.value;
        emit Received(msg.sender, msg.value);
    }
}

contract Implementation {
    uint256 public value;

    event ValueSet(address indexed by, uint256 value);

    function setValue(uint256 value_) external {
        value = value_;
        emit ValueSet(msg.sender, value_);
    }
}

/// Runs the implementation's code on its own storage: `value` is slot 0 in both.
contract Proxy {
    uint256 private value_;
    address public immutable implementation;

    constructor(address implementation_) {
        implementation = implementation_;
    }

    fallback(bytes calldata input) external payable returns (bytes memory) {
        (bool done, bytes memory output) = implementation.delegatecall(input);
        if (!done) {
            assembly {
                revert(add(output, 32), mload(output))
            }
        }
        return output;
    }
}
