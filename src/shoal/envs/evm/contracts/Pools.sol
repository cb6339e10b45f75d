// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import "./Token.sol";

/// Keeps tokens and says since when; pays nothing.
contract Staking {
    struct User {
        uint256 amount;
        uint256 depositTime;
    }

    Token public immutable token;
    mapping(address => User) public userInfo;

    event Deposited(address indexed user, uint256 amount);
    event Withdrawn(address indexed user, uint256 amount);

    constructor(Token token_) {
        token = token_;
    }

    function getUserInfo(address user) external view returns (uint256 amount, uint256 depositTime) {
        return (userInfo[user].amount, userInfo[user].depositTime);
    }

    function deposit(uint256 amount) external {
        require(amount > 0, "nothing to deposit");
        token.transferFrom(msg.sender, address(this), amount);
        userInfo[msg.sender].amount += amount;
        userInfo[msg.sender].depositTime = block.timestamp;
        emit Deposited(msg.sender, amount);
    }

    function withdraw(uint256 amount) external {
        require(userInfo[msg.sender].amount >= amount, "more than was deposited");
        userInfo[msg.sender].amount -= amount;
        token.transfer(msg.sender, amount);
        emit Withdrawn(msg.sender, amount);
    }
}

/// Keeps tokens and pays a fixed reward a block, shared by amount; the owner can grant a user more.
contract RewardPool {
    struct User {
        uint256 amount;
        uint256 rewardDebt;
    }

    uint256 private constant SCALE = 1e18;
    Token public immutable token;
    Token public immutable reward;
    uint256 public immutable rewardPerBlock;
    address public immutable owner;
    uint256 public totalStaked;
    uint256 public lastRewardBlock;
    uint256 public accRewardPerShare;
    mapping(address => User) public userInfo;
    mapping(address => uint256) public granted;

    event Deposited(address indexed user, uint256 amount);
    event Withdrawn(address indexed user, uint256 amount);
    event Harvested(address indexed user, uint256 amount);
    event EmergencyWithdrawn(address indexed user, uint256 amount);

    constructor(Token token_, Token reward_, uint256 rewardPerBlock_, address owner_) {
        (token, reward, rewardPerBlock, owner) = (token_, reward_, rewardPerBlock_, owner_);
        lastRewardBlock = block.number;
    }

    function grant(address user, uint256 amount) external {
        require(msg.sender == owner, "only the owner grants");
        reward.transferFrom(msg.sender, address(this), amount);
        granted[user] += amount;
    }

    function pendingReward(address user) public view returns (uint256) {
        uint256 perShare = accRewardPerShare;
        if (totalStaked > 0) perShare += ((block.number - lastRewardBlock) * rewardPerBlock * SCALE) / totalStaked;
        return (userInfo[user].amount * perShare) / SCALE - userInfo[user].rewardDebt + granted[user];
    }

    function deposit(uint256 amount) external {
        require(amount > 0, "nothing to deposit");
        _settle();
        token.transferFrom(msg.sender, address(this), amount);
        userInfo[msg.sender].amount += amount;
        totalStaked += amount;
        _mark();
        emit Deposited(msg.sender, amount);
    }

    function withdraw(uint256 amount) external {
        require(userInfo[msg.sender].amount >= amount, "more than was deposited");
        _settle();
        userInfo[msg.sender].amount -= amount;
        totalStaked -= amount;
        _mark();
        token.transfer(msg.sender, amount);
        emit Withdrawn(msg.sender, amount);
    }

    function harvest() external {
        _settle();
        _mark();
    }

    /// Take the stake out and give up the reward.
    function emergencyWithdraw() external {
        _accrue();
        uint256 amount = userInfo[msg.sender].amount;
        delete userInfo[msg.sender];
        delete granted[msg.sender];
        totalStaked -= amount;
        token.transfer(msg.sender, amount);
        emit EmergencyWithdrawn(msg.sender, amount);
    }

    function _accrue() private {
        if (totalStaked > 0) {
            accRewardPerShare += ((block.number - lastRewardBlock) * rewardPerBlock * SCALE) / totalStaked;
        }
        lastRewardBlock = block.number;
    }

    function _settle() private {
        _accrue();
        uint256 pending = pendingReward(msg.sender);
        granted[msg.sender] = 0;
        if (pending > 0) {
            reward.transfer(msg.sender, pending);
            emit Harvested(msg.sender, pending);
        }
    }

    function _mark() private {
        userInfo[msg.sender].rewardDebt = (userInfo[msg.sender].amount * accRewardPerShare) / SCALE;
    }
}

/// Lends for the length of one call: pays the caller, then takes the loan and 0.3 % back by its allowance.
contract FlashLoan {
    event Lent(address indexed borrower, address indexed token, uint256 amount, uint256 fee);

    function executeFlashLoan(Token token, uint256 amount) external {
        uint256 fee = (amount * 3) / 1000;
        require(amount > 0 && token.balanceOf(address(this)) >= amount, "not enough to lend");
        token.transfer(msg.sender, amount);
        token.transferFrom(msg.sender, address(this), amount + fee);
        emit Lent(msg.sender, address(token), amount, fee);
    }
}
