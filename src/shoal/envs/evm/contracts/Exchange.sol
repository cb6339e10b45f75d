// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import "./Token.sol";

// An automated market maker with the interface and the arithmetic of Uniswap V2, written from its published
// specification. The fee is a setting (in hundredths of a percent): PancakeSwap V2 takes 25, Uniswap V2 takes 30.
// Left out: the protocol fee (off by default in both), permits on liquidity tokens, and tokens that take a fee on
// transfer.

interface IExchangeCallee {
    function pancakeCall(address sender, uint256 amount0, uint256 amount1, bytes calldata data) external;
}

contract Pair is Token {
    uint256 public constant MINIMUM_LIQUIDITY = 1000;
    address public factory;
    address public token0;
    address public token1;
    uint256 public fee;
    uint112 private reserve0;
    uint112 private reserve1;
    uint32 private blockTimestampLast;
    uint256 public price0CumulativeLast;
    uint256 public price1CumulativeLast;
    bool private locked;

    event Mint(address indexed sender, uint256 amount0, uint256 amount1);
    event Burn(address indexed sender, uint256 amount0, uint256 amount1, address indexed to);
    event Swap(
        address indexed sender,
        uint256 amount0In,
        uint256 amount1In,
        uint256 amount0Out,
        uint256 amount1Out,
        address indexed to
    );
    event Sync(uint112 reserve0, uint112 reserve1);

    modifier lock() {
        require(!locked, "LOCKED");
        locked = true;
        _;
        locked = false;
    }

    function initializePair(address factory_, address token0_, address token1_, uint256 fee_) external {
        require(factory == address(0), "already initialised");
        (factory, token0, token1, fee) = (factory_, token0_, token1_, fee_);
        (name, symbol, decimals) = ("Pancake LPs", "Cake-LP", 18);
    }

    function getReserves() public view returns (uint112, uint112, uint32) {
        return (reserve0, reserve1, blockTimestampLast);
    }

    function mint(address to) external lock returns (uint256 liquidity) {
        (uint256 before0, uint256 before1, ) = getReserves();
        (uint256 balance0, uint256 balance1) = _balances();
        uint256 amount0 = balance0 - before0;
        uint256 amount1 = balance1 - before1;
        if (totalSupply == 0) {
            liquidity = _sqrt(amount0 * amount1) - MINIMUM_LIQUIDITY;
            _mint(address(0), MINIMUM_LIQUIDITY);
        } else {
            uint256 by0 = (amount0 * totalSupply) / before0;
            uint256 by1 = (amount1 * totalSupply) / before1;
            liquidity = by0 < by1 ? by0 : by1;
        }
        require(liquidity > 0, "INSUFFICIENT_LIQUIDITY_MINTED");
        _mint(to, liquidity);
        _update(balance0, balance1);
        emit Mint(msg.sender, amount0, amount1);
    }

    function burn(address to) external lock returns (uint256 amount0, uint256 amount1) {
        (uint256 balance0, uint256 balance1) = _balances();
        uint256 liquidity = balanceOf[address(this)];
        amount0 = (liquidity * balance0) / totalSupply;
        amount1 = (liquidity * balance1) / totalSupply;
        require(amount0 > 0 && amount1 > 0, "INSUFFICIENT_LIQUIDITY_BURNED");
        _burn(address(this), liquidity);
        Token(token0).transfer(to, amount0);
        Token(token1).transfer(to, amount1);
        (balance0, balance1) = _balances();
        _update(balance0, balance1);
        emit Burn(msg.sender, amount0, amount1, to);
    }

    function swap(uint256 amount0Out, uint256 amount1Out, address to, bytes calldata data) external lock {
        require(amount0Out > 0 || amount1Out > 0, "INSUFFICIENT_OUTPUT_AMOUNT");
        (uint256 before0, uint256 before1, ) = getReserves();
        require(amount0Out < before0 && amount1Out < before1, "INSUFFICIENT_LIQUIDITY");
        require(to != token0 && to != token1, "INVALID_TO");
        if (amount0Out > 0) Token(token0).transfer(to, amount0Out);
        if (amount1Out > 0) Token(token1).transfer(to, amount1Out);
        if (data.length > 0) IExchangeCallee(to).pancakeCall(msg.sender, amount0Out, amount1Out, data);
        (uint256 balance0, uint256 balance1) = _balances();
        uint256 amount0In = balance0 > before0 - amount0Out ? balance0 - (before0 - amount0Out) : 0;
        uint256 amount1In = balance1 > before1 - amount1Out ? balance1 - (before1 - amount1Out) : 0;
        require(amount0In > 0 || amount1In > 0, "INSUFFICIENT_INPUT_AMOUNT");
        {
            uint256 adjusted0 = balance0 * 10000 - amount0In * fee;
            uint256 adjusted1 = balance1 * 10000 - amount1In * fee;
            require(adjusted0 * adjusted1 >= before0 * before1 * 10000 ** 2, "K");
        }
        _update(balance0, balance1);
        emit Swap(msg.sender, amount0In, amount1In, amount0Out, amount1Out, to);
    }

    function skim(address to) external lock {
        (uint256 balance0, uint256 balance1) = _balances();
        Token(token0).transfer(to, balance0 - reserve0);
        Token(token1).transfer(to, balance1 - reserve1);
    }

    function sync() external lock {
        (uint256 balance0, uint256 balance1) = _balances();
        _update(balance0, balance1);
    }

    function _balances() private view returns (uint256, uint256) {
        return (Token(token0).balanceOf(address(this)), Token(token1).balanceOf(address(this)));
    }

    function _update(uint256 balance0, uint256 balance1) private {
        require(balance0 <= type(uint112).max && balance1 <= type(uint112).max, "OVERFLOW");
        uint32 timestamp = uint32(block.timestamp);
        unchecked {
            // Time and the accumulated prices wrap around by design: only their differences are used.
            uint32 elapsed = timestamp - blockTimestampLast;
            if (elapsed > 0 && reserve0 != 0 && reserve1 != 0) {
                price0CumulativeLast += ((uint256(reserve1) << 112) / reserve0) * elapsed;
                price1CumulativeLast += ((uint256(reserve0) << 112) / reserve1) * elapsed;
            }
        }
        (reserve0, reserve1, blockTimestampLast) = (uint112(balance0), uint112(balance1), timestamp);
        emit Sync(reserve0, reserve1);
    }

    function _sqrt(uint256 y) private pure returns (uint256 z) {
        if (y <= 3) return y == 0 ? 0 : 1;
        z = y;
        uint256 x = y / 2 + 1;
        while (x < z) {
            z = x;
            x = (y / x + x) / 2;
        }
    }
}

contract Factory {
    mapping(address => mapping(address => address)) public getPair;
    address[] public allPairs;

    event PairCreated(address indexed token0, address indexed token1, address pair, uint256 count);

    function allPairsLength() external view returns (uint256) {
        return allPairs.length;
    }

    /// Adopt a pair contract that exists already and names this factory. Pairs live at given addresses here, so
    /// there is no `createPair`; a pair of tokens can be registered once.
    function register(Pair pair) external {
        (address token0, address token1) = (pair.token0(), pair.token1());
        require(pair.factory() == address(this) && token0 < token1, "INVALID_PAIR");
        require(getPair[token0][token1] == address(0), "PAIR_EXISTS");
        getPair[token0][token1] = address(pair);
        getPair[token1][token0] = address(pair);
        allPairs.push(address(pair));
        emit PairCreated(token0, token1, address(pair), allPairs.length);
    }
}

contract Router {
    address public factory;
    address public WETH;
    uint256 public fee;

    modifier ensure(uint256 deadline) {
        require(deadline >= block.timestamp, "EXPIRED");
        _;
    }

    function initialize(address factory_, address weth, uint256 fee_) external {
        require(factory == address(0), "already initialised");
        (factory, WETH, fee) = (factory_, weth, fee_);
    }

    receive() external payable {
        require(msg.sender == WETH, "only WBNB may pay");
    }

    // Liquidity

    function addLiquidity(
        address tokenA,
        address tokenB,
        uint256 amountADesired,
        uint256 amountBDesired,
        uint256 amountAMin,
        uint256 amountBMin,
        address to,
        uint256 deadline
    ) external ensure(deadline) returns (uint256 amountA, uint256 amountB, uint256 liquidity) {
        (amountA, amountB) = _amounts(tokenA, tokenB, amountADesired, amountBDesired, amountAMin, amountBMin);
        Pair pair = _pair(tokenA, tokenB);
        Token(tokenA).transferFrom(msg.sender, address(pair), amountA);
        Token(tokenB).transferFrom(msg.sender, address(pair), amountB);
        liquidity = pair.mint(to);
    }

    function addLiquidityETH(
        address token,
        uint256 amountTokenDesired,
        uint256 amountTokenMin,
        uint256 amountETHMin,
        address to,
        uint256 deadline
    ) external payable ensure(deadline) returns (uint256 amountToken, uint256 amountETH, uint256 liquidity) {
        (amountToken, amountETH) =
            _amounts(token, WETH, amountTokenDesired, msg.value, amountTokenMin, amountETHMin);
        Pair pair = _pair(token, WETH);
        Token(token).transferFrom(msg.sender, address(pair), amountToken);
        WrappedNative(payable(WETH)).deposit{value: amountETH}();
        Token(WETH).transfer(address(pair), amountETH);
        liquidity = pair.mint(to);
        if (msg.value > amountETH) _pay(msg.sender, msg.value - amountETH);
    }

    function removeLiquidity(
        address tokenA,
        address tokenB,
        uint256 liquidity,
        uint256 amountAMin,
        uint256 amountBMin,
        address to,
        uint256 deadline
    ) public ensure(deadline) returns (uint256 amountA, uint256 amountB) {
        Pair pair = _pair(tokenA, tokenB);
        pair.transferFrom(msg.sender, address(pair), liquidity);
        (uint256 amount0, uint256 amount1) = pair.burn(to);
        (amountA, amountB) = tokenA < tokenB ? (amount0, amount1) : (amount1, amount0);
        require(amountA >= amountAMin, "INSUFFICIENT_A_AMOUNT");
        require(amountB >= amountBMin, "INSUFFICIENT_B_AMOUNT");
    }

    function removeLiquidityETH(
        address token,
        uint256 liquidity,
        uint256 amountTokenMin,
        uint256 amountETHMin,
        address to,
        uint256 deadline
    ) external returns (uint256 amountToken, uint256 amountETH) {
        (amountToken, amountETH) =
            removeLiquidity(token, WETH, liquidity, amountTokenMin, amountETHMin, address(this), deadline);
        Token(token).transfer(to, amountToken);
        WrappedNative(payable(WETH)).withdraw(amountETH);
        _pay(to, amountETH);
    }

    function _amounts(
        address tokenA,
        address tokenB,
        uint256 desiredA,
        uint256 desiredB,
        uint256 minA,
        uint256 minB
    ) private view returns (uint256, uint256) {
        (uint256 reserveA, uint256 reserveB) = _reserves(tokenA, tokenB);
        if (reserveA == 0 && reserveB == 0) return (desiredA, desiredB);
        uint256 optimalB = quote(desiredA, reserveA, reserveB);
        if (optimalB <= desiredB) {
            require(optimalB >= minB, "INSUFFICIENT_B_AMOUNT");
            return (desiredA, optimalB);
        }
        uint256 optimalA = quote(desiredB, reserveB, reserveA);
        require(optimalA <= desiredA && optimalA >= minA, "INSUFFICIENT_A_AMOUNT");
        return (optimalA, desiredB);
    }

    // Swaps

    function swapExactTokensForTokens(
        uint256 amountIn,
        uint256 amountOutMin,
        address[] calldata path,
        address to,
        uint256 deadline
    ) external ensure(deadline) returns (uint256[] memory amounts) {
        amounts = getAmountsOut(amountIn, path);
        require(amounts[amounts.length - 1] >= amountOutMin, "INSUFFICIENT_OUTPUT_AMOUNT");
        _takeAndSwap(amounts, path, to);
    }

    function swapTokensForExactTokens(
        uint256 amountOut,
        uint256 amountInMax,
        address[] calldata path,
        address to,
        uint256 deadline
    ) external ensure(deadline) returns (uint256[] memory amounts) {
        amounts = getAmountsIn(amountOut, path);
        require(amounts[0] <= amountInMax, "EXCESSIVE_INPUT_AMOUNT");
        _takeAndSwap(amounts, path, to);
    }

    function swapExactETHForTokens(uint256 amountOutMin, address[] calldata path, address to, uint256 deadline)
        external
        payable
        ensure(deadline)
        returns (uint256[] memory amounts)
    {
        require(path[0] == WETH, "INVALID_PATH");
        amounts = getAmountsOut(msg.value, path);
        require(amounts[amounts.length - 1] >= amountOutMin, "INSUFFICIENT_OUTPUT_AMOUNT");
        _wrapAndSwap(amounts, path, to);
    }

    function swapETHForExactTokens(uint256 amountOut, address[] calldata path, address to, uint256 deadline)
        external
        payable
        ensure(deadline)
        returns (uint256[] memory amounts)
    {
        require(path[0] == WETH, "INVALID_PATH");
        amounts = getAmountsIn(amountOut, path);
        require(amounts[0] <= msg.value, "EXCESSIVE_INPUT_AMOUNT");
        _wrapAndSwap(amounts, path, to);
        if (msg.value > amounts[0]) _pay(msg.sender, msg.value - amounts[0]);
    }

    function swapExactTokensForETH(
        uint256 amountIn,
        uint256 amountOutMin,
        address[] calldata path,
        address to,
        uint256 deadline
    ) external ensure(deadline) returns (uint256[] memory amounts) {
        amounts = getAmountsOut(amountIn, path);
        require(amounts[amounts.length - 1] >= amountOutMin, "INSUFFICIENT_OUTPUT_AMOUNT");
        _swapAndUnwrap(amounts, path, to);
    }

    function swapTokensForExactETH(
        uint256 amountOut,
        uint256 amountInMax,
        address[] calldata path,
        address to,
        uint256 deadline
    ) external ensure(deadline) returns (uint256[] memory amounts) {
        amounts = getAmountsIn(amountOut, path);
        require(amounts[0] <= amountInMax, "EXCESSIVE_INPUT_AMOUNT");
        _swapAndUnwrap(amounts, path, to);
    }

    function _takeAndSwap(uint256[] memory amounts, address[] calldata path, address to) private {
        Token(path[0]).transferFrom(msg.sender, address(_pair(path[0], path[1])), amounts[0]);
        _swap(amounts, path, to);
    }

    function _wrapAndSwap(uint256[] memory amounts, address[] calldata path, address to) private {
        WrappedNative(payable(WETH)).deposit{value: amounts[0]}();
        Token(WETH).transfer(address(_pair(path[0], path[1])), amounts[0]);
        _swap(amounts, path, to);
    }

    function _swapAndUnwrap(uint256[] memory amounts, address[] calldata path, address to) private {
        require(path[path.length - 1] == WETH, "INVALID_PATH");
        _takeAndSwap(amounts, path, address(this));
        uint256 received = amounts[amounts.length - 1];
        WrappedNative(payable(WETH)).withdraw(received);
        _pay(to, received);
    }

    function _swap(uint256[] memory amounts, address[] calldata path, address to) private {
        for (uint256 i = 0; i + 1 < path.length; i++) {
            uint256 out = amounts[i + 1];
            address receiver = i + 2 < path.length ? address(_pair(path[i + 1], path[i + 2])) : to;
            (uint256 out0, uint256 out1) = path[i] < path[i + 1] ? (uint256(0), out) : (out, uint256(0));
            _pair(path[i], path[i + 1]).swap(out0, out1, receiver, "");
        }
    }

    // Arithmetic

    function quote(uint256 amountA, uint256 reserveA, uint256 reserveB) public pure returns (uint256) {
        require(amountA > 0, "INSUFFICIENT_AMOUNT");
        require(reserveA > 0 && reserveB > 0, "INSUFFICIENT_LIQUIDITY");
        return (amountA * reserveB) / reserveA;
    }

    function getAmountOut(uint256 amountIn, uint256 reserveIn, uint256 reserveOut) public view returns (uint256) {
        require(amountIn > 0, "INSUFFICIENT_INPUT_AMOUNT");
        require(reserveIn > 0 && reserveOut > 0, "INSUFFICIENT_LIQUIDITY");
        uint256 taken = amountIn * (10000 - fee);
        return (taken * reserveOut) / (reserveIn * 10000 + taken);
    }

    function getAmountIn(uint256 amountOut, uint256 reserveIn, uint256 reserveOut) public view returns (uint256) {
        require(amountOut > 0, "INSUFFICIENT_OUTPUT_AMOUNT");
        require(reserveIn > 0 && reserveOut > 0, "INSUFFICIENT_LIQUIDITY");
        return (reserveIn * amountOut * 10000) / ((reserveOut - amountOut) * (10000 - fee)) + 1;
    }

    function getAmountsOut(uint256 amountIn, address[] calldata path) public view returns (uint256[] memory amounts) {
        require(path.length >= 2, "INVALID_PATH");
        amounts = new uint256[](path.length);
        amounts[0] = amountIn;
        for (uint256 i = 0; i + 1 < path.length; i++) {
            (uint256 reserveIn, uint256 reserveOut) = _reserves(path[i], path[i + 1]);
            amounts[i + 1] = getAmountOut(amounts[i], reserveIn, reserveOut);
        }
    }

    function getAmountsIn(uint256 amountOut, address[] calldata path) public view returns (uint256[] memory amounts) {
        require(path.length >= 2, "INVALID_PATH");
        amounts = new uint256[](path.length);
        amounts[path.length - 1] = amountOut;
        for (uint256 i = path.length - 1; i > 0; i--) {
            (uint256 reserveIn, uint256 reserveOut) = _reserves(path[i - 1], path[i]);
            amounts[i - 1] = getAmountIn(amounts[i], reserveIn, reserveOut);
        }
    }

    function _pair(address tokenA, address tokenB) private view returns (Pair pair) {
        pair = Pair(Factory(factory).getPair(tokenA, tokenB));
        require(address(pair) != address(0), "NO_PAIR");
    }

    function _reserves(address tokenA, address tokenB) private view returns (uint256, uint256) {
        (uint256 reserve0, uint256 reserve1, ) = _pair(tokenA, tokenB).getReserves();
        return tokenA < tokenB ? (reserve0, reserve1) : (reserve1, reserve0);
    }

    function _pay(address to, uint256 value) private {
        (bool sent, ) = to.call{value: value}("");
        require(sent, "transfer of BNB failed");
    }
}
