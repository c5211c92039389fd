-- may end in: runtime memory timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local g local function f() return 1 + g() end g = function() return 1 + f() end return f() end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
